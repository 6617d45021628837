"""Both losses in Triton: the host code of triton_rows.py. The GEMMs are torch's."""

import torch
from torch import Tensor

from emu3_kernels.ops.loss.chunks import Kernels, as_ops
from emu3_kernels.ops.loss.gpu_chunks import GpuRun
from emu3_kernels.ops.loss.token_loss import check_classes, classes_rule
from emu3_kernels.ops.loss.triton_rows import (
    cross_entropy_bwd_kernel,
    cross_entropy_fwd_kernel,
    cross_entropy_reduce_kernel,
    linear_cross_entropy_add_kernel,
    linear_cross_entropy_bwd_kernel,
)
from emu3_kernels.runtime.autograd import needs_gradient, once_differentiable
from emu3_kernels.runtime.checks import rows
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import cdiv, launch, tile, why_not_triton

# 16 elements a thread with warps of 32 threads, 8 (the 16 bytes of one access) with 64. Stages are
# blocks of a row in flight, since few rows have to keep a multiprocessor busy.
SUMS_TILE = tile(num_warps=8, num_stages=4, BLOCK=4096, STAGES=4)
GRADIENT_TILE = tile(num_warps=4, BLOCK=2048)
REDUCE_TILE = tile(num_warps=8, BLOCK=1024)


def why_not(x: Tensor, *_: object) -> str | None:
    return why_not_triton(x)


def vector_width(logits: Tensor) -> int:
    """Return the elements of one access of 16 bytes."""
    return 16 // logits.element_size()


def misalignment_of(logits: Tensor) -> int:
    """Count the elements from the last multiple of 16 bytes to the first logit."""
    return logits.data_ptr() // logits.element_size() % vector_width(logits)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    if not targets.is_cuda:  # else the kernels check them
        check_classes("cross_entropy", targets, logits.shape[-1], ignore_index)
    number = None if normalizer is None or isinstance(normalizer, Tensor) else float(normalizer)
    tensor = normalizer.to(logits.device) if isinstance(normalizer, Tensor) else None
    tokens = (rows(logits), targets.reshape(-1).contiguous())
    weights = None if weights is None else weights.reshape(-1).contiguous()
    settings = (weights, tensor, number, z_loss, label_smoothing, ignore_index, reduction)
    if needs_gradient(logits):
        out = _CrossEntropy.apply(*tokens, *settings)
    else:
        out = forward(*tokens, *settings)[0]
    return out.view(targets.shape) if reduction == "none" else out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, weights, *settings):
        out, saved = forward(logits, targets, weights, *settings)
        ctx.save_for_backward(logits, targets, weights, saved)
        ctx.settings = settings[2:5]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return backward(dout, *ctx.saved_tensors, *ctx.settings), *[None] * 8


def forward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    normalizer: Tensor | None,
    number: float | None,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Return the loss, or those of ``[T]`` tokens for "none", and what the gradient takes.

    That is what weighted losses are divided by, whether all targets are fine, and m and log2(l) of
    each softmax. The normalizer is in a tensor, or ``number``, or both are None.
    """
    if torch.compiler.is_compiling():
        return _forward_op(
            logits, targets, weights, normalizer, number,
            z_loss, label_smoothing, ignore_index, reduction,
        )  # fmt: skip
    num_rows, num_classes = logits.shape
    saved, losses, total = _empty_results(logits)
    weighted, normalized = weights is not None, normalizer is not None or number is not None
    if num_rows:
        launch(
            cross_entropy_fwd_kernel, (num_rows,),
            logits, targets, weights, normalizer, losses, saved,
            misalignment_of(logits), logits.stride(0), num_classes, ignore_index, number,
            z_loss, label_smoothing,
            WEIGHTED=weighted, NORMALIZED=normalized and reduction == "none",
            SMOOTHED=label_smoothing != 0, VECTOR=vector_width(logits), **SUMS_TILE,
        )  # fmt: skip
    launch(
        cross_entropy_reduce_kernel, (1,),
        losses, targets, weights, normalizer, total, saved,
        num_rows, num_classes, ignore_index, number,
        WEIGHTED=weighted, NORMALIZED=normalized, MEAN=reduction == "mean", **REDUCE_TILE,
    )  # fmt: skip
    if saved.is_cuda:
        torch._assert_async(saved[1], f"cross_entropy: {classes_rule(num_classes, ignore_index)}")
    return losses if reduction == "none" else total, saved


def _empty_results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = len(logits)
    saved = logits.new_empty(2 + 2 * num_rows, dtype=torch.float32)
    return saved, saved.new_empty(num_rows), saved.new_empty(())


def backward(
    dout: Tensor,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    saved: Tensor,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """Return the gradient of the logits; ``dout`` is one number, or ``[T]``."""
    if torch.compiler.is_compiling():
        settings = (z_loss, label_smoothing, ignore_index)
        return _backward_op(dout, logits, targets, weights, saved, *settings)
    dlogits = _empty_aligned_like(logits, misalignment_of(logits))
    if logits.numel():
        launch(
            cross_entropy_bwd_kernel, _gradient_grid(logits),
            logits, dlogits, targets, weights, saved, dout,
            misalignment_of(logits), logits.stride(0), dlogits.stride(0),
            dout.stride(0) if dout.dim() else 0, logits.shape[1], ignore_index,
            z_loss, label_smoothing,
            WEIGHTED=weights is not None, VECTOR=vector_width(logits), **GRADIENT_TILE,
        )  # fmt: skip
    return dlogits


def _gradient_grid(logits: Tensor) -> tuple[int, int]:
    num_rows, width = logits.shape
    return num_rows, cdiv(width + vector_width(logits), GRADIENT_TILE["BLOCK"])


def _empty_aligned_like(logits: Tensor, misalignment: int) -> Tensor:
    """Make a tensor like ``logits`` whose rows have the same misalignment."""
    num_rows, num_classes = logits.shape
    stride = num_classes + (logits.stride(0) - num_classes) % vector_width(logits)
    memory = logits.new_empty(misalignment + num_rows * stride)
    return memory.as_strided((num_rows, num_classes), (stride, 1), misalignment)


@torch.library.custom_op("emu3_kernels::cross_entropy_forward_triton", mutates_args=())
def _forward_op(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    normalizer: Tensor | None,
    number: float | None,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` for torch.compile, which knows no address and so no misalignment."""
    settings = (number, z_loss, label_smoothing, ignore_index, reduction)
    return forward(logits, targets, weights, normalizer, *settings)


@_forward_op.register_fake
def _(logits, *settings):
    saved, losses, total = _empty_results(logits)
    return losses if settings[-1] == "none" else total, saved


@torch.library.custom_op("emu3_kernels::cross_entropy_backward_triton", mutates_args=())
def _backward_op(
    dout: Tensor,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    saved: Tensor,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    settings = (z_loss, label_smoothing, ignore_index)
    return backward(dout, logits, targets, weights, saved, *settings)


@_backward_op.register_fake
def _(dout, logits, *_):
    # Without an address, but storages are aligned.
    return _empty_aligned_like(logits, logits.storage_offset() % vector_width(logits))


def add_(
    logits: Tensor, targets: Tensor, state: Tensor, first: int, label_smoothing: float
) -> None:
    num_rows, width = logits.shape
    if logits.numel():
        launch(
            linear_cross_entropy_add_kernel, (num_rows,),
            logits, targets, state, misalignment_of(logits), logits.stride(0), width, first,
            SMOOTHED=label_smoothing != 0, VECTOR=vector_width(logits), **SUMS_TILE,
        )  # fmt: skip


def gradient_(
    logits: Tensor,
    targets: Tensor,
    softmax: Tensor,
    dlosses: Tensor,
    first: int,
    num_classes: int,
    z_loss: float,
    label_smoothing: float,
) -> None:
    if logits.numel():
        launch(
            linear_cross_entropy_bwd_kernel, _gradient_grid(logits),
            logits, targets, softmax, dlosses, misalignment_of(logits), logits.stride(0),
            logits.shape[1], first, num_classes, z_loss, label_smoothing,
            VECTOR=vector_width(logits), **GRADIENT_TILE,
        )  # fmt: skip


losses, gradients = as_ops("triton", Kernels(add_, gradient_), GpuRun)
BACKENDS = {
    "cross_entropy": Backend(why_not, function=cross_entropy),
    "linear_cross_entropy": Backend(why_not, losses, gradients),
}
