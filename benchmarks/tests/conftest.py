"""The benchmarks are tested on the CPU, with Triton's interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import pytest

from benchmarks.harness import machine


@pytest.fixture(autouse=True)
def a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time on the CPU beside a GPU too: what is tested is the command."""
    monkeypatch.setattr(machine, "device", lambda: "cpu")
    monkeypatch.setattr(machine, "gpu", lambda: None)
