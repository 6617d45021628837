"""Fused, differentiable ops for Emu3-type models: Triton, CUDA C++ and CPU C++."""

from emu3_kernels.ops.attention.api import attention, decode_attention
from emu3_kernels.ops.attention.key_ranges import Documents
from emu3_kernels.ops.attention.ring.api import ring_attention
from emu3_kernels.ops.attention.ring.shards import shard_sequence, unshard_sequence
from emu3_kernels.ops.conv2d.api import conv3x3
from emu3_kernels.ops.conv3d.api import causal_conv3d, temporal_residual
from emu3_kernels.ops.conv3d.cache import FrameCache
from emu3_kernels.ops.group_norm.api import group_norm_silu, spatial_norm_silu
from emu3_kernels.ops.loss.api import cross_entropy, linear_cross_entropy
from emu3_kernels.ops.norm.api import add_rms_norm, rms_norm
from emu3_kernels.ops.preference.api import preference_loss
from emu3_kernels.ops.quantized.api import quantize_weight, quantized_linear
from emu3_kernels.ops.rope.api import rope, rope_append, rope_tables
from emu3_kernels.ops.sampling.api import sample_guided
from emu3_kernels.ops.swiglu.api import swiglu, swiglu_packed
from emu3_kernels.ops.vq.api import CodeIndex, nearest_code
from emu3_kernels.runtime.dispatch import record_backends, use_backend
from emu3_kernels.runtime.dropout import HeadShard, site_seeds

__all__ = [
    "CodeIndex",
    "Documents",
    "FrameCache",
    "HeadShard",
    "add_rms_norm",
    "attention",
    "causal_conv3d",
    "conv3x3",
    "cross_entropy",
    "decode_attention",
    "group_norm_silu",
    "linear_cross_entropy",
    "nearest_code",
    "preference_loss",
    "quantize_weight",
    "quantized_linear",
    "record_backends",
    "ring_attention",
    "rms_norm",
    "rope",
    "rope_append",
    "rope_tables",
    "sample_guided",
    "shard_sequence",
    "site_seeds",
    "spatial_norm_silu",
    "swiglu",
    "swiglu_packed",
    "temporal_residual",
    "unshard_sequence",
    "use_backend",
]
