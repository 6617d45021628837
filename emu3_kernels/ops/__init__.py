"""One op, one folder. OPS is what the tests, the benchmarks and the code-generation gate walk."""

OPS = (
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "nearest_code",
    "rope",
    "rope_append",
    "cross_entropy",
    "linear_cross_entropy",
    "attention",
    "decode_attention",
    "group_norm_silu",
    "spatial_norm_silu",
    "causal_conv3d",
    "temporal_residual",
    "conv3x3",
    "linear",
)
