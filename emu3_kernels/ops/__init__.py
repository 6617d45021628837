"""One op, one folder. OPS is what the tests, the benchmarks and the code-generation gate walk."""

OPS = (
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "nearest_code",
    "rope",
    "cross_entropy",
    "linear_cross_entropy",
)
