"""One family, one folder. OPS is what the tests, the benchmarks and the gates walk."""

OPS = {
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "swiglu": "swiglu",
    "nearest_code": "vq",
    "rope": "rope",
    "rope_append": "rope",
    "cross_entropy": "loss",
    "linear_cross_entropy": "loss",
    "attention": "attention",
    "decode_attention": "attention",
    "group_norm_silu": "group_norm",
    "spatial_norm_silu": "group_norm",
    "causal_conv3d": "conv3d",
    "temporal_residual": "conv3d",
    "conv3x3": "conv2d",
    "sample_guided": "sampling",
    "quantized_linear": "quantized",
}
"""The family, a folder beside this file, of every op with a generic test."""
