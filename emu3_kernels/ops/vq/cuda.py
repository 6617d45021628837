"""nearest_code on a GPU in CUDA C++: csrc/cuda/vq/nearest_code.cuh."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend

# Asks the dispatcher alone; no GPU is touched.
HAS_KERNEL = not library.MISSING and torch._C._dispatch_has_kernel_for_dispatch_key(
    "emu3_kernels::nearest_code", "CUDA"
)


def why_not(z: Tensor, codebook: Tensor) -> str | None:
    if not HAS_KERNEL:
        return library.MISSING or "the native library was built without CUDA"
    if not z.is_cuda:
        return f"no kernel for a {z.device.type} tensor"
    if torch.float64 in (z.dtype, codebook.dtype):
        return "float64 is left to the reference"
    return None


def forward(z: Tensor, codebook: Tensor, tree: Tensor | None) -> Tensor:
    # The kernel reads float32 and bfloat16; float16 becomes float32 without loss.
    z = z.float() if z.dtype == torch.float16 else z
    return torch.ops.emu3_kernels.nearest_code(z, codebook, None)


BACKENDS = {"nearest_code": Backend(why_not, forward)}
