"""nearest_code on the CPU: csrc/cpu/vq/nearest_code.cpp."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend


def why_not(z: Tensor, codebook: Tensor) -> str | None:
    if library.MISSING:
        return library.MISSING
    if not z.is_cpu:
        return f"no kernel for a {z.device.type} tensor"
    if torch.float64 in (z.dtype, codebook.dtype):
        return "float64 is left to the reference"
    return None


def forward(z: Tensor, codebook: Tensor, tree: Tensor | None) -> Tensor:
    # The kernels read float32 and bfloat16; float16 becomes float32 without loss.
    z = z.float() if z.dtype == torch.float16 else z
    return torch.ops.emu3_kernels.nearest_code(z, codebook, tree)


def build_tree(codebook: Tensor) -> Tensor:
    return torch.ops.emu3_kernels.nearest_code_tree(codebook)


def tree_size(num_codes: int, dim: int) -> int:
    """Count the 32-bit words of a tree, as csrc/cpu/vq/code_tree.cpp lays it out."""
    num_leaves = 16
    while num_leaves * 16 < num_codes:
        num_leaves *= 2
    num_groups = num_leaves // 16
    num_clusters = -(-num_groups // 16)
    boxes = (num_clusters + num_groups) * dim * 32
    return boxes + num_leaves * (3 + 16 * dim + 16)


if not library.MISSING:
    # The first is of the CUDA kernel too: one op, one kernel for each type of device.

    @torch.library.register_fake("emu3_kernels::nearest_code")
    def _(z: Tensor, codebook: Tensor, tree: Tensor | None) -> Tensor:
        return z.new_empty((z.shape[0], z.shape[2]), dtype=torch.int64)

    @torch.library.register_fake("emu3_kernels::nearest_code_tree")
    def _(codebook: Tensor) -> Tensor:
        return codebook.new_empty(tree_size(*codebook.shape), dtype=torch.int32)


BACKENDS = {"nearest_code": Backend(why_not, forward)}
