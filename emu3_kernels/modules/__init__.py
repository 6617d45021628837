"""The ops as ``nn.Module``, with parameters under the usual names.

Every module calls the op of its name, whose docstring states formula and precision.
``use_backend`` applies to them, and ``speed_up_bfloat16`` to a whole model on an old CPU.
"""

from emu3_kernels.modules.language import (
    AddRMSNorm,
    CrossEntropy,
    LinearCrossEntropy,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
)
from emu3_kernels.modules.quantized import QuantizedLinear
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
    "QuantizedLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "SpatialNormSiLU",
    "SwiGLU",
    "TemporalResidual",
    "VectorQuantizer",
    "speed_up_bfloat16",
]
