"""cross_entropy in Triton: a program for each row forward, for each block of one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.ops.loss import triton_rows as rows
from emu3_kernels.ops.loss.triton_rows import SUMS_TILE, lanes, lead_of, sums_of_row
from emu3_kernels.runtime.launch import Config, meta, why_not_triton


def why_not(logits: Tensor, *_: object) -> str | None:
    return why_not_triton(logits)


def forward(
    logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the losses ``[T]`` and the softmax denominators ``[T, 2]``; 0 where the weight is."""
    num_rows, num_classes = logits.shape
    losses, denominators = weights.new_empty(num_rows), weights.new_empty(num_rows, 2)
    if num_rows:
        _fwd_kernel[(num_rows,)](
            logits, targets, weights, losses, denominators,
            lead_of(logits), logits.stride(0), num_classes, z_loss, label_smoothing,
            SMOOTHED=label_smoothing != 0, LANES=lanes(logits), STAGES=SUMS_TILE.num_stages,
            **SUMS_TILE.options(),
        )  # fmt: skip
    return losses, denominators


def backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    denominators: Tensor,
    z_loss: float,
    label_smoothing: float,
) -> Tensor:
    dlogits = _empty_alike(logits)
    settings = (logits.shape[1], z_loss, label_smoothing)
    if logits.numel():
        rows.write_gradient(
            logits, dlogits, targets, denominators, dlosses.contiguous(), 0, *settings
        )
    return dlogits


def _empty_alike(logits: Tensor) -> Tensor:
    """Make a tensor like ``logits`` whose rows lie within 16 bytes as theirs do."""
    num_rows, num_classes = logits.shape
    lead, stride = lead_of(logits), logits.stride(0)
    stride = num_classes + (stride - num_classes) % lanes(logits)
    memory = logits.new_empty(lead + num_rows * stride)
    return memory[lead:].view(num_rows, stride)[:, :num_classes]


@triton.jit
def _fwd_kernel(
    logits_ptr, targets_ptr, weights_ptr, losses_ptr, denominators_ptr,
    lead, stride, num_classes, z_loss, label_smoothing,
    SMOOTHED: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = lse - (1 - s) * logits[target] - s * mean(logits) + z * lse**2."""
    row = tl.program_id(0).to(tl.int64)
    kept = tl.load(weights_ptr + row) != 0
    width = tl.where(kept, num_classes, 0)
    highest, total_exp, total = sums_of_row(
        logits_ptr, lead, lead + row * stride, width, SMOOTHED, LANES, BLOCK, STAGES
    )
    target = tl.load(targets_ptr + row)
    target = tl.load(logits_ptr + row * stride + target, mask=kept, other=0).to(tl.float32)
    lse = highest + tl.log(total_exp)
    loss = lse - (1 - label_smoothing) * target.to(tl.float64) + z_loss * lse * lse
    if SMOOTHED:
        loss -= label_smoothing * total / num_classes
    log2_sum = tl.log2(total_exp)
    tl.store(losses_ptr + row, tl.where(kept, loss, 0))
    tl.store(denominators_ptr + 2 * row, tl.where(kept, highest, 0))
    tl.store(denominators_ptr + 2 * row + 1, tl.where(kept, log2_sum, 0))


def _emu3(smoothing: float, *, backwards: bool) -> None:
    """Emu3's vocabulary, whose rows start at every even place of a group."""
    logits, targets = meta(256, 184622), meta(256, dtype=torch.int64)
    weights, denominators = meta(256, dtype=torch.float32), meta(256, 2, dtype=torch.float32)
    if backwards:
        backward(weights, logits, targets, denominators, 0.0, smoothing)
    else:
        forward(logits, targets, weights, 0.0, smoothing)


CONFIGS = (
    Config("256 x 184622", lambda: _emu3(0.0, backwards=False), {"_fwd_kernel": rows.SUMS}),
    Config(
        "256 x 184622, smoothed", lambda: _emu3(0.1, backwards=False), {"_fwd_kernel": rows.SUMS}
    ),
    Config("256 x 184622", lambda: _emu3(0.0, backwards=True), {"_gradient_kernel": rows.GRADIENT}),
)
