"""``python -m benchmarks gpu``: everything one wants from a short visit to a GPU."""
