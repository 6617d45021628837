"""rope and rope_append on the CPU: csrc/cpu/rope/rope.cpp. See api.py for the arguments."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend

OPS = torch.ops.emu3_kernels


def why_not(q: Tensor, cos: Tensor) -> str | None:
    if cos.dtype != torch.float32:
        return f"tables in {cos.dtype} are left to the reference"
    return library.why_not_cpu(q)


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    *,
    inverse: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    if out is None:
        return OPS.rope(q, k, cos, sin, positions, inverse)
    OPS.rope_out(q, k, cos, sin, positions, *out)
    return out


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> Tensor:
    return OPS.rope_append(q, k, v, cos, sin, key_cache, value_cache, slots, positions)


BACKENDS = {"rope": Backend(why_not, rotate, rotate), "rope_append": Backend(why_not, append)}

if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::rope")
    def _(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape)

    @torch.library.register_fake("emu3_kernels::rope_out")
    def _(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        q_out: Tensor,
        k_out: Tensor,
    ) -> None: ...

    @torch.library.register_fake("emu3_kernels::rope_append")
    def _(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        positions: Tensor,
    ) -> Tensor:
        return q.new_empty(q.shape)
