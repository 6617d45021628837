"""quantized_linear on the CPU: csrc/cpu/quantized/quantized_linear.cpp."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.gemm import SLOW_IN_BFLOAT16, mm_

MAX_ROWS = 16
"""More are multiplied by a GEMM."""
TILE = 4 << 20
"""Elements of the weight that such a GEMM reads at a time."""
SCALES = {torch.int8: torch.float32, torch.uint8: torch.bfloat16}
"""What :func:`emu3_kernels.quantize_weight` makes, by the dtype of the codes."""


def why_not(x: Tensor, codes: Tensor, scales: Tensor) -> str | None:
    if library.MISSING:
        return library.MISSING
    if not x.is_cpu:
        return f"no kernel for a {x.device.type} tensor"
    if scales.dtype != SCALES[codes.dtype]:
        return f"scales of {codes.dtype} codes in {scales.dtype} are left to the reference"
    return "float64 is left to the reference" if x.dtype == torch.float64 else None


def forward(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    if x.dtype == torch.float16:  # the kernels read float32 and bfloat16
        return forward(x.float(), codes, scales).half()
    if len(x) <= MAX_ROWS:
        return torch.ops.emu3_kernels.quantized_linear(x, codes, scales)
    # Without bfloat16 instructions a GEMM in bfloat16 is one in float32, and a conversion.
    compute = torch.float32 if SLOW_IN_BFLOAT16 else x.dtype
    operand, y = x.to(compute), x.new_empty(len(x), len(codes))
    rows = max(1, TILE // x.shape[1])
    for first in range(0, len(codes), rows):
        columns = slice(first, first + rows)
        tile = operand.new_empty(len(codes[columns]), x.shape[1])
        torch.ops.emu3_kernels.dequantize(codes, scales, first, tile)
        if compute == x.dtype:
            mm_(y[:, columns], operand, tile.t())
        else:
            y[:, columns] = torch.mm(operand, tile.t())
    return y


BACKENDS = {"quantized_linear": Backend(why_not, forward)}

if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::quantized_linear")
    def _(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], codes.shape[0])

    @torch.library.register_fake("emu3_kernels::dequantize")
    def _(codes: Tensor, scales: Tensor, begin: int, out: Tensor) -> None:
        pass
