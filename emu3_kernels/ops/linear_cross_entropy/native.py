"""linear_cross_entropy on the CPU: matrix products by torch, the rest csrc/cpu/cross_entropy.cpp.

The loop over blocks is opaque to ``torch.compile``: how many tokens count is known when it runs.
It may be a Python op because 50 microseconds a call are nothing beside its matrix products.
"""

import torch
from torch import Tensor

from emu3_kernels import _native
from emu3_kernels.ops.linear_cross_entropy import blocks
from emu3_kernels.ops.linear_cross_entropy.blocks import Kernels, Settings


def why_not(hidden: Tensor, *_: object) -> str | None:
    return _native.why_not_cpu(hidden)


def kernels() -> Kernels:
    ops = torch.ops.emu3_kernels
    return Kernels(ops.linear_cross_entropy_add_, ops.linear_cross_entropy_gradient_)


@torch.library.custom_op("emu3_kernels::linear_cross_entropy_losses", mutates_args=())
def losses(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_loss: float,
    label_smoothing: float,
    memory: int,
) -> Tensor:
    """Return the losses ``[T]`` before their weights, 0 where the weight is."""
    kept = weights.nonzero().squeeze(1)
    settings = Settings(z_loss, label_smoothing, memory)
    counted = blocks.losses(kernels(), hidden[kept], head, targets[kept], settings)
    return weights.new_zeros(weights.shape).index_copy_(0, kept, counted)


@torch.library.custom_op("emu3_kernels::linear_cross_entropy_gradients", mutates_args=())
def gradients(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    dlosses: Tensor,
    z_loss: float,
    label_smoothing: float,
    memory: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`losses`, with dlosses for weights, and the gradients of their product."""
    kept = dlosses.nonzero().squeeze(1)
    settings = Settings(z_loss, label_smoothing, memory)
    counted, dkept, dhead = blocks.losses_and_gradients(
        kernels(), hidden[kept], head, targets[kept], dlosses[kept], settings
    )
    dhidden = hidden.new_zeros(hidden.shape).index_copy_(0, kept, dkept)
    return dlosses.new_zeros(dlosses.shape).index_copy_(0, kept, counted), dhidden, dhead


@losses.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_loss: float,
    label_smoothing: float,
    memory: int,
) -> Tensor:
    return weights.new_empty(weights.shape)


@gradients.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    dlosses: Tensor,
    z_loss: float,
    label_smoothing: float,
    memory: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return dlosses.new_empty(dlosses.shape), hidden.new_empty(hidden.shape), torch.empty_like(head)
