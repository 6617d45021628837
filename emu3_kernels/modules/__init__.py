"""The ops as ``nn.Module``: the same mathematics, with parameters under the names everybody uses.

Every module calls the op of its name, whose docstring states formula and precision;
``use_backend`` chooses for them.
"""

from emu3_kernels.modules.language import (
    AddRMSNorm,
    CrossEntropy,
    LinearCrossEntropy,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
)
from emu3_kernels.modules.slow_bfloat16 import speed_up_bfloat16
from emu3_kernels.modules.vision import (
    CausalConv3d,
    Conv3x3,
    GroupNormSiLU,
    Memory,
    SpatialNormSiLU,
    TemporalResidual,
    VectorQuantizer,
)

__all__ = [
    "AddRMSNorm",
    "CausalConv3d",
    "Conv3x3",
    "CrossEntropy",
    "GroupNormSiLU",
    "LinearCrossEntropy",
    "Memory",
    "RMSNorm",
    "RotaryEmbedding",
    "SpatialNormSiLU",
    "SwiGLU",
    "TemporalResidual",
    "VectorQuantizer",
    "speed_up_bfloat16",
]
