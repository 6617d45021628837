"""linear_cross_entropy on the CPU: products by torch, the rest csrc/cpu/cross_entropy.cpp."""

import torch
from torch import Tensor

from emu3_kernels.ops.loss.blocks import Kernels, as_ops
from emu3_kernels.runtime import library


def why_not(hidden: Tensor, *_: object) -> str | None:
    return library.why_not_cpu(hidden)


def add_(*block: Tensor | float) -> None:
    torch.ops.emu3_kernels.linear_cross_entropy_add_(*block)


def gradient_(*block: Tensor | float) -> None:
    torch.ops.emu3_kernels.linear_cross_entropy_gradient_(*block)


losses, gradients = as_ops("cpu", Kernels(add_, gradient_))
