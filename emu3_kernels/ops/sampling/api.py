"""Guided sampling of codes: from two rows of logits to the code drawn, in one pass.

B batch, T places of one sequence, N codes.

Backends have ``forward(cond [B, T, N], uncond, seeds [B], places [B, T], guidance, top_k, top_p,
temperature, num)``, which returns ``[B, T, num]`` int64. Rows of logits have unit stride and may
lie anywhere; ``uncond`` is like ``cond`` or None, for logits that are ``cond`` alone; ``top_k`` is
at most N; a ``top_p`` of 1 keeps every code.
"""

import math

import torch
from torch import Tensor

from emu3_kernels.ops.sampling import reference
from emu3_kernels.runtime.checks import check_alike, check_floating, describe
from emu3_kernels.runtime.dispatch import Backends

BACKENDS = Backends(
    "sample_guided",
    __package__,
    reference.sample_guided,
    cpu=("cpu",),
    cuda=("triton",),
)

LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Below it, 1 / temperature overflows in float32."""
MOST_CODES = 1 << 23
"""The softmax mass of a row, in units of 2^-40, then fits 63 bits."""


def sample_guided(
    cond: Tensor,
    uncond: Tensor | None,
    seeds: Tensor,
    places: Tensor,
    *,
    guidance: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    num: int = 1,
    backend: str | None = None,
) -> Tensor:
    r"""Draw ``num`` codes a row without replacement from guided logits, by keyed Gumbel noise.

    ``z = uncond + guidance * (cond - uncond)`` in float32 (float64 for float64 logits), clamped
    to the finite numbers of float32; at guidance 1 it is ``cond``, at guidance 0 ``uncond``. Of
    z the ``top_k`` largest are kept, of equal ones the lower ids. Of the softmax of
    ``z / temperature`` over those, the smallest prefix in descending order (the same rule for
    equal ones) whose mass, rounded to float32, reaches ``top_p`` is kept: at least one code.
    The codes are those of the ``num`` greatest scores ``(z - max z) / temperature + G`` among
    the kept, in descending order, of equal ones the lower id first: the first is a draw from the
    softmax over the kept codes, the others are draws without replacement. ``top_k=1`` is greedy.

    ``G[v] = -log(-log1p(-(word + 1/2) / 2**32))`` is the Gumbel noise of code v. Its word is word
    ``v % 4`` of Philox 4x32-10 with the key ``seed`` of the batch entry and the counter
    ``(v // 4, place, 0, 1)``, so a seed and a place draw the same code in any batch, beside any
    other places, on any device, up to the last bits of the logarithm. Dropout never uses these
    words. Give every sequence a seed of its own.

    A row gives -1 for every code if its place is negative or a logit z is NaN. Not
    differentiable. The host does not wait for the device.

    Args:
        cond: ``[B, T, N]`` or ``[B, N]``, any floating dtype. Strides are any; rows without unit
            stride are copied.
        uncond: like ``cond``; may be None if guidance is 1.
        seeds: ``[B]`` int64; all 64 bits are used.
        places: ``[B, T]`` or ``[B]`` int64, the position of the code in its sequence; its lower 32
            bits are used.
        guidance: scale of classifier-free guidance, not negative.
        top_k: how many codes are kept, at least 1; None or more than N keeps all.
        top_p: softmax mass that is kept, in ``(0, 1]``; None or 1 keeps all.
        temperature: positive.
        num: codes to return for each row, at least 1.
        backend: a key of ``BACKENDS``, or None for the first that fits.

    Returns:
        ``[B, T, num]`` or ``[B, num]`` int64; -1 after the last kept code.
    """
    _check_settings(guidance, top_k, top_p, temperature, num)
    _check_tensors(cond, uncond, seeds, places, guidance)
    if guidance == 0:
        cond, uncond = uncond, None
    elif guidance == 1:
        uncond = None
    temperature = max(temperature, LEAST_TEMPERATURE)
    chosen = BACKENDS.choose(backend, cond)
    cond, uncond = cond.detach(), None if uncond is None else uncond.detach()
    if chosen.function is not None:
        settings = {"guidance": guidance, "top_k": top_k, "top_p": top_p, "num": num}
        return chosen.function(cond, uncond, seeds, places, temperature=temperature, **settings)
    num_codes = cond.shape[-1]
    codes = chosen.forward(
        _rows(cond),
        None if uncond is None else _rows(uncond),
        seeds.contiguous(),
        (places if places.dim() == 2 else places[:, None]).contiguous(),
        float(guidance),
        num_codes if top_k is None else min(top_k, num_codes),
        1.0 if top_p is None else float(top_p),
        float(temperature),
        num,
    )
    return codes if places.dim() == 2 else codes.squeeze(1)


def _rows(logits: Tensor) -> Tensor:
    """Return ``logits`` as ``[B, T, N]`` with unit stride in N; a view if there is one."""
    logits = logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()
    return logits if logits.dim() == 3 else logits[:, None]


def _check_settings(
    guidance: float, top_k: int | None, top_p: float | None, temperature: float, num: int
) -> None:
    for name, holds, must, got in (
        ("guidance", 0 <= guidance < math.inf, "finite and not negative", guidance),
        ("top_k", top_k is None or top_k >= 1, "at least 1 or None", top_k),
        ("top_p", top_p is None or 0 < top_p <= 1, "in (0, 1] or None", top_p),
        ("temperature", 0 < temperature < math.inf, "positive and finite", temperature),
        ("num", num >= 1, "at least 1", num),
    ):
        if not holds:
            raise ValueError(f"sample_guided: {name} must be {must}, got {got}")


def _check_tensors(
    cond: Tensor, uncond: Tensor | None, seeds: Tensor, places: Tensor, guidance: float
) -> None:
    shape, device = cond.shape, cond.device
    if uncond is not None:
        check_alike("sample_guided", "cond and uncond", cond, uncond)
    elif guidance != 1:
        raise ValueError(f"sample_guided: guidance must be 1 if uncond is None, got {guidance}")
    check_floating("sample_guided", cond=cond)
    if len(shape) not in (2, 3) or not 1 <= shape[-1] <= MOST_CODES:
        raise ValueError(
            f"sample_guided: cond must be [B, T, N] or [B, N] with N from 1 to {MOST_CODES}, "
            f"got {describe(cond)}"
        )
    for name, tensor, expected in (("seeds", seeds, shape[:1]), ("places", places, shape[:-1])):
        if (tensor.shape, tensor.dtype, tensor.device) != (expected, torch.int64, device):
            raise ValueError(
                f"sample_guided: {name} must be {tuple(expected)} torch.int64 {device} as cond is "
                f"{tuple(shape)}, got {describe(tensor)}"
            )
