"""The definition of attention in plain PyTorch, which ring_attention shares."""

from emu3_kernels.ops.attention.reference import attention

__all__ = ["attention"]
