"""One op, one folder. OPS is what the tests, the benchmarks and the code-generation gate walk."""

OPS = ("swiglu",)
