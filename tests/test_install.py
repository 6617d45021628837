"""Installation without a compiler, import without the library, import time."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import emu3_kernels
from emu3_kernels.runtime import library, versions
from emu3_kernels.testing.compilers import OLDEST
from tests import fresh

ROOT = Path(__file__).parents[1]


def test_without_a_compiler_the_installation_says_so_in_one_line():
    build = "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    done = fresh.run(build, "--quiet", "build_ext", CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler here, the native library is not built" in done.stdout


def test_without_the_library_the_reference_runs_and_says_so_once():
    done = fresh.run(
        "import sys; sys.modules['emu3_kernels._C'] = None\n"
        "import torch, emu3_kernels as ek\n"
        "gate = torch.tensor([1.0]); print([ek.swiglu(gate, gate).item() for _ in range(3)])\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0.731058")
    assert done.stderr.count("the native library was not built") == 1


def with_version(package: str, version: str) -> subprocess.CompletedProcess:
    return fresh.run(
        f"import {package}; {package}.__version__ = {version!r}\n"
        "import emu3_kernels as ek\n"
        "from emu3_kernels.runtime import dispatch; print(dispatch.backends('rms_norm')['triton'])",
        TRITON_INTERPRET="0",
    )


def test_an_older_torch_gets_one_line_at_import():
    done = with_version("torch", "2.10.1+cu126")
    last = done.stderr.splitlines()[-1]
    assert last == "ImportError: emu3_kernels: torch must be 2.11 or newer, got 2.10.1+cu126"


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed here")
def test_an_older_triton_gets_one_line_at_import_and_is_left_out():
    done = with_version("triton", "3.5.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "triton must be 3.6 or newer, got 3.5.1\n"
    assert done.stderr.count("emu3_kernels: triton must be 3.6 or newer, got 3.5.1") == 1


def test_the_oldest_versions_are_those_of_the_project_file():
    stated = (ROOT / "pyproject.toml").read_text()
    for package, oldest in versions.OLDEST.items():
        assert f'"{package}>={oldest}"' in stated
    assert OLDEST.startswith(versions.OLDEST["triton"])


def test_the_level_can_be_lowered_from_outside():
    done = fresh.run(
        "from emu3_kernels.runtime import library; print(library.cpu_level())",
        EMU3_CPU_LEVEL="base",
    )
    assert done.stdout == "base\n", done.stderr


@pytest.mark.skipif(bool(library.MISSING), reason="no native library here to audit")
def test_the_library_needs_only_stable_interfaces():
    """One binary serves every CPython from 3.10 and every torch from 2.11."""
    command = [
        Path(sys.executable).parent / "torch-abi-audit",
        "--check",
        "both",
        library._C.__file__,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "min-torch=2.11.0" in done.stdout


@pytest.mark.parametrize("value", ["shape", "dtype", "device", "channels"])
def test_bad_input_gets_one_line_that_names_the_op(value):
    gate = torch.zeros(2, 3)
    bad = {
        "shape": (gate, torch.zeros(3, 2)),
        "dtype": (gate, gate.half()),
        "device": (gate, gate.to("meta")),
        "channels": (gate.sum(), gate.sum()),
    }[value]
    with pytest.raises(ValueError, match=r"^swiglu: .* must .*, got [^\n]*$"):
        emu3_kernels.swiglu(*bad)


def test_bad_input_of_other_kinds_gets_one_line_too():
    gate = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"^swiglu: gate must be floating point, got torch\.int64$"):
        emu3_kernels.swiglu(gate.long(), gate.long())
    with pytest.raises(ValueError, match=r"^rms_norm: weight must be \[3\] on cpu"):
        emu3_kernels.rms_norm(gate, torch.ones(4))
