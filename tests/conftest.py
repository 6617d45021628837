"""Set before anything imports triton: the interpreter where there is no GPU, and NaN poison."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torch.empty now returns NaN: a kernel that leaves an element unwritten fails its test.
torch.use_deterministic_algorithms(True, warn_only=True)

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
