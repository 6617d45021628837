"""sample_guided on the CPU: csrc/cpu/sampling/sample_guided.cpp."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend


def why_not(cond: Tensor) -> str | None:
    if library.MISSING:
        return library.MISSING
    if not cond.is_cpu:
        return f"no kernel for a {cond.device.type} tensor"
    return "float64 is left to the reference" if cond.dtype == torch.float64 else None


def forward(cond: Tensor, uncond: Tensor | None, *rest: Tensor | float) -> Tensor:
    if cond.dtype == torch.float16:  # the kernels read float32 and bfloat16
        cond, uncond = cond.float(), None if uncond is None else uncond.float()
    return torch.ops.emu3_kernels.sample_guided(cond, uncond, *rest)


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::sample_guided")
    def _(
        cond: Tensor,
        uncond: Tensor | None,
        seeds: Tensor,
        places: Tensor,
        guidance: float,
        top_k: int,
        top_p: float,
        temperature: float,
        num: int,
    ) -> Tensor:
        return places.new_empty((*places.shape, num))


BACKENDS = {"sample_guided": Backend(why_not, forward)}
