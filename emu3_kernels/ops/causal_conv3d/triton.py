"""causal_conv3d in Triton: emu3_kernels/_causal_conv/*launch.py."""

from emu3_kernels._causal_conv.backward_triton import backward
from emu3_kernels._causal_conv.blocks_triton import why_not
from emu3_kernels._causal_conv.contracts_triton import CONFIGS
from emu3_kernels._causal_conv.forward_triton import forward

__all__ = ["CONFIGS", "backward", "forward", "why_not"]
