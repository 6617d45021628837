"""Fused, differentiable ops for Emu3-type models: Triton, CUDA C++ and native CPU code."""

from emu3_kernels.ops.attention.attention_api import attention
from emu3_kernels.ops.attention.decode_attention_api import decode_attention
from emu3_kernels.ops.attention.ring.shards import shard_sequence, unshard_sequence
from emu3_kernels.ops.attention.ring_attention_api import ring_attention
from emu3_kernels.ops.conv2d.api import conv3x3
from emu3_kernels.ops.conv3d.api import causal_conv3d, temporal_residual
from emu3_kernels.ops.conv3d.cache import FrameCache
from emu3_kernels.ops.group_norm.api import group_norm_silu, spatial_norm_silu
from emu3_kernels.ops.linear.api import linear
from emu3_kernels.ops.loss.cross_entropy_api import cross_entropy
from emu3_kernels.ops.loss.linear_cross_entropy_api import linear_cross_entropy
from emu3_kernels.ops.norm.add_rms_norm_api import add_rms_norm
from emu3_kernels.ops.norm.rms_norm_api import rms_norm
from emu3_kernels.ops.rope.rope_api import rope, rope_tables
from emu3_kernels.ops.rope.rope_append_api import rope_append
from emu3_kernels.ops.swiglu.api import swiglu, swiglu_packed
from emu3_kernels.ops.vq.api import CodeIndex, nearest_code
from emu3_kernels.runtime.dispatch import record_backends, use_backend
from emu3_kernels.runtime.gemm import widened
from emu3_kernels.runtime.library import in_large_pages

__all__ = [
    "CodeIndex",
    "FrameCache",
    "add_rms_norm",
    "attention",
    "causal_conv3d",
    "conv3x3",
    "cross_entropy",
    "decode_attention",
    "group_norm_silu",
    "in_large_pages",
    "linear",
    "linear_cross_entropy",
    "nearest_code",
    "record_backends",
    "ring_attention",
    "rms_norm",
    "rope",
    "rope_append",
    "rope_tables",
    "shard_sequence",
    "spatial_norm_silu",
    "swiglu",
    "swiglu_packed",
    "temporal_residual",
    "unshard_sequence",
    "use_backend",
    "widened",
]
