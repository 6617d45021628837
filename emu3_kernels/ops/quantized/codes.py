"""Codes and scales of a weight: how they are made and read.

N outputs, K inputs.
"""

import torch
from torch import Tensor

BLOCK = 32
"""Inputs that share 16 bytes of int4."""
LARGEST = {"int8": 127, "int4": 7}
_PIECE = 1 << 20
"""Elements of a weight that are quantized at a time, in float32."""


def quantize(weight: Tensor, bits: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``weight [N, K]``, in pieces of rows."""
    (num_out, num_in), is_int8 = weight.shape, bits == "int8"
    codes = weight.new_empty(
        (num_out, num_in if is_int8 else num_in // 2), dtype=torch.int8 if is_int8 else torch.uint8
    )
    scales = weight.new_empty(
        (num_out,) if is_int8 else (num_out, num_in // group_size),
        dtype=torch.float32 if is_int8 else torch.bfloat16,
    )
    rows = max(1, _PIECE // num_in)
    for first in range(0, num_out, rows):
        piece = slice(first, first + rows)
        codes[piece], scales[piece] = _quantize(weight[piece], bits, group_size)
    return codes, scales


def _quantize(weight: Tensor, bits: str, group_size: int) -> tuple[Tensor, Tensor]:
    size = weight.shape[1] if bits == "int8" else group_size
    groups, largest = weight.float().unflatten(1, (-1, size)), LARGEST[bits]
    scales = groups.abs().amax(-1) / largest
    if bits == "int4":
        scales = scales.bfloat16()
    divisor = scales.float().masked_fill(scales == 0, 1)
    codes = (groups / divisor[..., None]).round().clamp(-largest, largest).flatten(1)
    return (codes.char(), scales[:, 0]) if bits == "int8" else (pack(codes), scales)


def pack(codes: Tensor) -> Tensor:
    """Two codes of ``[N, K]`` a byte: inputs i and 16 + i of each 32, both plus 8."""
    lower, upper = (codes + 8).byte().unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return (lower | upper << 4).flatten(1)


def unpack(codes: Tensor) -> Tensor:
    """``[N, K]`` int8 of :func:`pack`."""
    blocks = codes.unflatten(1, (-1, BLOCK // 2))
    return torch.stack((blocks & 15, blocks >> 4), dim=2).flatten(1).char() - 8


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight ``[N, K]``: each code times its scale, rounded to ``dtype``."""
    compute = torch.promote_types(dtype, torch.float32)
    if codes.dtype == torch.int8:
        return (codes.to(compute) * scales.to(compute)[:, None]).to(dtype)
    groups = unpack(codes).to(compute).unflatten(1, (scales.shape[1], -1))
    return (groups * scales.to(compute)[:, :, None]).flatten(1).to(dtype)
