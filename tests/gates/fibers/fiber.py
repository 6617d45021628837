"""Builds a test program around fiber.h with the C++ compiler; one build per content."""

import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from tests.gates.compiled import CSRC, CXX, file_of, has, version_of, with_includes

HERE = Path(__file__).parent
FLAGS = ["-O2", "-std=c++20", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]


@cache
def build(source: str) -> Path:
    """Compile ``tests/gates/fibers/<source>`` and return the program."""
    assert has(CXX), "the tests of the CUDA kernels need a C++ compiler"

    def make() -> bytes:
        with TemporaryDirectory() as folder:
            program = Path(folder, "program")
            includes = [f"-I{CSRC}", f"-I{HERE}"]
            subprocess.run([CXX, *FLAGS, *includes, HERE / source, "-o", program], check=True)
            return program.read_bytes()

    text = with_includes((HERE / source).read_text(), HERE)
    return file_of(
        "\n".join(["fiber", version_of(CXX), *FLAGS, text]), make, f"-{Path(source).stem}"
    )


def run(program: Path, *args: str, stdin: bytes = b"") -> bytes:
    """Run ``program`` and return what it wrote; RuntimeError with its message if it failed."""
    done = subprocess.run([program, *args], input=stdin, capture_output=True, check=False)
    if done.returncode < 0:
        raise RuntimeError(f"{program.name}: killed by signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError(done.stderr.decode())
    return done.stdout


def raw(tensor: Tensor) -> bytes:
    """The bytes from a tensor's first element to its last, gaps of its strides included."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((last + 1,), (1,))
    return flat.view(torch.uint8).numpy().tobytes()
