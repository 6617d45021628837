"""A linear layer whose weight is stored in 8 or 4 bits. M rows, N outputs, K inputs.

Backends have ``forward(x [M, K], codes, scales) -> [M, N]``; rows of ``x`` have unit stride, codes
and scales are contiguous.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.quantized import codes as making
from emu3_kernels.ops.quantized import reference
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.checks import check_floating, describe, rows
from emu3_kernels.runtime.dispatch import Backends

BACKENDS = Backends(
    "quantized_linear",
    __package__,
    reference.quantized_linear,
    cpu=("cpu",),
    cuda=("triton",),
)
BITS = ("int8", "int4")
GROUP_SIZES = (32, 64, 128)


def quantize_weight(
    weight: Tensor, bits: str = "int8", *, group_size: int = 64
) -> tuple[Tensor, Tensor]:
    r"""Codes and scales of a weight, for :func:`quantized_linear`; symmetric, without a zero point.

    int8 has a scale for each output: ``scale = max |weight| / 127`` over its inputs, in float32.
    int4 has one for each ``group_size`` inputs of an output: ``scale = max |weight| / 7``, rounded
    to bfloat16. ``code = clamp(round(weight / scale), -127, 127)``, or -7 and 7, computed in
    float32; ties go to even. A scale of 0 gives codes of 0.

    Args:
        weight: ``[N, K]``, any floating dtype, finite.
        bits: ``"int8"`` or ``"int4"``.
        group_size: 32, 64 or 128, of int4; it divides K.

    Returns:
        codes and scales: int8 ``[N, K]`` and float32 ``[N]``, or uint8 ``[N, K / 2]`` and bfloat16
        ``[N, K / group_size]``. Byte ``16 j + i`` of a row of uint8 holds the codes of the inputs
        ``32 j + i``, in its lower half, and ``32 j + 16 + i``, both plus 8.
    """
    if bits not in BITS:
        raise ValueError(f"quantize_weight: bits must be one of {BITS}, got {bits!r}")
    check_floating("quantize_weight", weight=weight)
    if weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(f"quantize_weight: weight must be [N, K], got {describe(weight)}")
    if bits == "int4" and (group_size not in GROUP_SIZES or weight.shape[1] % group_size):
        raise ValueError(
            f"quantize_weight: group_size must be one of {GROUP_SIZES} and divide K = "
            f"{weight.shape[1]}, got {group_size}"
        )
    return making.quantize(weight.detach(), bits, group_size)


def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, *, backend: str | None = None
) -> Tensor:
    r"""Multiply by a weight in 8 or 4 bits: ``y[n] = sum_k x[k] * codes[n, k] * scale[n, k]``.

    Products and sums are float32 and rounded once, to the dtype of ``x``. Up to 16 rows, those of
    decode steps, read the codes once and never store the weight. For more rows the weight is
    rounded to the dtype of ``x`` in tiles, on a CPU to float32 where that is faster, and multiplied
    by PyTorch's GEMM. Not differentiable: under ``torch.no_grad()``, or with an ``x`` that has no
    gradient.

    Args:
        x: ``[..., K]``, any floating dtype.
        codes: of :func:`quantize_weight`, or rows of them: int8 ``[N, K]`` or uint8 ``[N, K / 2]``.
        scales: the rows of its scales: ``[N]``, or ``[N, K / group_size]``.
        backend: a key of ``BACKENDS``, or None for the first that fits.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    _check(x, codes, scales)
    chosen = BACKENDS.choose(backend, x, codes, scales)
    if chosen.function is not None:
        return chosen.function(x, codes, scales)
    y = chosen.forward(rows(x), codes.contiguous(), scales.contiguous())
    return y.view(*x.shape[:-1], y.shape[-1])


def _check(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    check_floating("quantized_linear", x=x, scales=scales)
    is_int8 = codes.dtype == torch.int8
    if codes.dim() != 2 or not (is_int8 or codes.dtype == torch.uint8):
        raise ValueError(
            "quantized_linear: codes must be [N, K] torch.int8 or [N, K / 2] torch.uint8, "
            f"got {describe(codes)}"
        )
    (num_out, width), device = codes.shape, codes.device
    num_in = width if is_int8 else 2 * width
    if x.shape[-1:] != (num_in,) or num_in == 0 or x.device != device:
        raise ValueError(
            f"quantized_linear: x must be [..., {num_in}] on {device} as codes are "
            f"{tuple(codes.shape)} {codes.dtype}, got {describe(x)}"
        )
    shape = scales.shape
    fits = shape == (num_out,) if is_int8 else len(shape) == 2 and shape[0] == num_out
    if not is_int8:
        fits = fits and any(shape[1] * size == num_in for size in GROUP_SIZES)
    if not fits or scales.device != device:
        must = f"[{num_out}]" if is_int8 else f"[{num_out}, {num_in} / {GROUP_SIZES}]"
        raise ValueError(
            f"quantized_linear: scales must be {must} on {device}, got {describe(scales)}"
        )
    if needs_gradient(x):
        raise ValueError(
            "quantized_linear: x must have no gradient: codes have none, call under torch.no_grad()"
        )
