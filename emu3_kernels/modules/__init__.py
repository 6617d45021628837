"""The ops as ``nn.Module``: the same mathematics, with parameters under the names everybody uses.

Every module calls the op of its name, whose docstring states formula and precision;
``use_backend`` chooses for them.
"""

from emu3_kernels.modules.language import (
    AddRMSNorm,
    CrossEntropy,
    Linear,
    LinearCrossEntropy,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
)
from emu3_kernels.modules.vision import (
    CausalConv3d,
    Conv2d,
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
    "Conv2d",
    "Conv3x3",
    "CrossEntropy",
    "GroupNormSiLU",
    "Linear",
    "LinearCrossEntropy",
    "Memory",
    "RMSNorm",
    "RotaryEmbedding",
    "SpatialNormSiLU",
    "SwiGLU",
    "TemporalResidual",
    "VectorQuantizer",
]
