"""Measured and counted figures of the ops: ``python -m benchmarks --help``."""
