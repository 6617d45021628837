"""Fused, differentiable ops for Emu3-type models: Triton, CUDA C++ and native CPU code."""

from emu3_kernels._dispatch import use_backend
from emu3_kernels.ops.add_rms_norm.api import add_rms_norm
from emu3_kernels.ops.rms_norm.api import rms_norm
from emu3_kernels.ops.swiglu.api import swiglu, swiglu_packed

__all__ = ["add_rms_norm", "rms_norm", "swiglu", "swiglu_packed", "use_backend"]
