"""causal_conv3d in Triton: emu3_kernels/_causal_conv/*launch.py."""

from emu3_kernels.ops.conv3d.contracts import CONFIGS
from emu3_kernels.ops.conv3d.triton_backward import backward
from emu3_kernels.ops.conv3d.triton_blocks import why_not
from emu3_kernels.ops.conv3d.triton_forward import forward

__all__ = ["CONFIGS", "backward", "forward", "why_not"]
