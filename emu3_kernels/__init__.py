"""Fused, differentiable ops for Emu3-type models: Triton, CUDA C++ and native CPU code."""

from emu3_kernels._dispatch import use_backend
from emu3_kernels.ops.swiglu.api import swiglu, swiglu_packed

__all__ = ["swiglu", "swiglu_packed", "use_backend"]
