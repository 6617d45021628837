"""use_backend, record_backends and the CPU level in force."""

import pytest
import torch

import emu3_kernels
from emu3_kernels.runtime import library

X, WEIGHT = torch.ones(2, 16), torch.ones(16)


def test_use_backend_holds_inside_its_block_alone():
    with emu3_kernels.record_backends() as used:
        with emu3_kernels.use_backend("reference"):
            emu3_kernels.rms_norm(X, WEIGHT)
        emu3_kernels.swiglu(X, X)
    emu3_kernels.rms_norm(X, WEIGHT, backend="reference")
    assert used["rms_norm"] == "reference"
    assert used["swiglu"] != "reference"


def test_use_backend_can_name_the_ops_it_is_for():
    with emu3_kernels.record_backends() as used, emu3_kernels.use_backend("cpu"):
        with emu3_kernels.use_backend("reference", "rms_norm"):
            emu3_kernels.rms_norm(X, WEIGHT)
            emu3_kernels.swiglu(X, X)
        assert used == {"rms_norm": "reference", "swiglu": "cpu"}
        emu3_kernels.rms_norm(X, WEIGHT)
    assert used["rms_norm"] == "cpu"


def test_a_backend_asked_for_by_name_wins_over_use_backend():
    with emu3_kernels.record_backends() as used, emu3_kernels.use_backend("cpu"):
        emu3_kernels.rms_norm(X, WEIGHT, backend="reference")
    assert used == {"rms_norm": "reference"}


def test_a_backend_that_cannot_run_is_never_swapped():
    with pytest.raises(
        NotImplementedError,
        match=r"^rms_norm: backend 'cpu' cannot run this call: torch.float64 is left to",
    ):
        emu3_kernels.rms_norm(X.double(), WEIGHT.double(), backend="cpu")


def test_an_unknown_level_names_the_known_ones():
    with (
        pytest.raises(ValueError, match=r"^use_cpu_level: expected one of base.*, got 'mmx'$"),
        library.use_cpu_level("mmx"),
    ):
        pass


def test_the_innermost_use_backend_wins_whatever_it_names():
    with emu3_kernels.record_backends() as used, emu3_kernels.use_backend("cpu", "rms_norm"):
        emu3_kernels.swiglu(X, X)
        with emu3_kernels.use_backend("reference"):
            emu3_kernels.rms_norm(X, WEIGHT)
    assert used["rms_norm"] == "reference"
