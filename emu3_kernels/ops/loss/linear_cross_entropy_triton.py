"""linear_cross_entropy in Triton: products by torch, the rows of logits between them here."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.loss import blocks
from emu3_kernels.ops.loss import triton_rows as rows
from emu3_kernels.ops.loss.blocks import Kernels
from emu3_kernels.ops.loss.tiles import MEMORY, copies_of, tile
from emu3_kernels.ops.loss.triton_rows import SUMS_TILE, lanes, lead_of, sums_of_row
from emu3_kernels.runtime.launch import Config, meta, why_not_triton


def why_not(hidden: Tensor, *_: object) -> str | None:
    return why_not_triton(hidden)


def add_(logits: Tensor, targets: Tensor, sums: Tensor, first: int, label_smoothing: float) -> None:
    num_rows, width = logits.shape
    if logits.numel():
        _add_kernel[(num_rows,)](
            logits, targets, sums, lead_of(logits), logits.stride(0), width, first,
            SMOOTHED=label_smoothing != 0, LANES=lanes(logits), STAGES=SUMS_TILE.num_stages,
            **SUMS_TILE.options(),
        )  # fmt: skip


def gradient_(
    logits: Tensor,
    targets: Tensor,
    denominators: Tensor,
    dlosses: Tensor,
    first: int,
    num_classes: int,
    z_loss: float,
    label_smoothing: float,
) -> None:
    if logits.numel():
        rows.write_gradient(
            logits, logits, targets, denominators, dlosses,
            first, num_classes, z_loss, label_smoothing,
        )  # fmt: skip


losses, gradients = blocks.as_ops("triton", Kernels(add_, gradient_))


@triton.jit
def _add_kernel(
    logits_ptr, targets_ptr, sums_ptr, lead, stride, width, first,
    SMOOTHED: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a block of classes to the four sums of each row; the first block begins them."""
    row = tl.program_id(0).to(tl.int64)
    highest, total_exp, total = sums_of_row(
        logits_ptr, lead, lead + row * stride, width, SMOOTHED, LANES, BLOCK, STAGES
    )
    target = tl.load(targets_ptr + row) - first
    here = (target >= 0) & (target < width)
    logit = tl.load(logits_ptr + row * stride + target, mask=here, other=0)

    sums_ptr += 4 * row
    later = first > 0
    before = tl.load(sums_ptr, mask=later, other=rows.LOWEST).to(tl.float32)
    top = tl.maximum(before, highest)
    before_exp = tl.load(sums_ptr + 1, mask=later, other=0)
    total_exp *= tl.exp2((highest - top) * rows.LOG2E)
    total_exp += before_exp * tl.exp2((before - top) * rows.LOG2E)
    total += tl.load(sums_ptr + 2, mask=later, other=0)
    logit = logit.to(tl.float64) + tl.load(sums_ptr + 3, mask=later, other=0)
    tl.store(sums_ptr, top.to(tl.float64))
    tl.store(sums_ptr + 1, total_exp)
    tl.store(sums_ptr + 2, total)
    tl.store(sums_ptr + 3, logit)


def _emu3(first: int, *, smoothing: float = 0.0, backwards: bool = False) -> None:
    """2,048 tokens of Emu3's vocabulary, in blocks of the default memory."""
    head = meta(184622, 4096)
    memory = MEMORY + copies_of(2048 * head.shape[1], head.dtype)
    block = tile(2048, *head.shape, head.dtype, memory, wants_head=True).classes
    logits = meta(2048, block)[:, : 184622 - first]
    targets, dlosses = meta(2048, dtype=torch.int64), meta(2048, dtype=torch.float32)
    if backwards:
        denominators = meta(2048, 2, dtype=torch.float32)
        gradient_(logits, targets, denominators, dlosses, first, 184622, 0.0, smoothing)
    else:
        add_(logits, targets, meta(2048, 4, dtype=torch.float64), first, smoothing)


# Narrow beside the parts of a group: a target, its logit and the four sums, read and written.
ADD = replace(rows.SUMS, scalar_loads=2 * 8 + 6, scalar_stores=4)
CONFIGS = (
    Config("2048, first block", lambda: _emu3(0), {"_add_kernel": ADD}),
    Config("2048, ragged, smoothed", lambda: _emu3(180_000, smoothing=0.1), {"_add_kernel": ADD}),
    Config(
        "2048, first block",
        lambda: _emu3(0, backwards=True),
        {"_gradient_kernel": rows.GRADIENT},
    ),
    Config(
        "2048, ragged",
        lambda: _emu3(180_000, backwards=True),
        {"_gradient_kernel": rows.GRADIENT},
    ),
)
