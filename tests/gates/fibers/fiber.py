"""Builds a test program around fiber.h with the C++ compiler; one build per content."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = os.environ.get("CXX", "c++")


def build(source: str) -> Path:
    """Compile ``tests/cuda/<source>`` and return the program."""
    assert shutil.which(COMPILER), "the tests of the CUDA kernels need a C++ compiler"
    headers = [*sorted((ROOT / "csrc/cuda").glob("*.cuh")), *sorted(HERE.glob("*.h"))]
    content = b"".join(path.read_bytes() for path in [HERE / source, *headers])
    name = f"{Path(source).stem}-{hashlib.sha256(content).hexdigest()[:16]}"
    program = ROOT / "build/fiber" / name
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O2", "-std=c++20", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
        fresh = program.with_suffix(f".{os.getpid()}")
        command = [COMPILER, *flags, f"-I{ROOT / 'csrc/cuda'}", str(HERE / source), "-o", fresh]
        subprocess.run(command, check=True)
        fresh.rename(program)
    return program


def run(program: Path, *args: str, stdin: bytes = b"") -> bytes:
    """Run ``program`` and return what it wrote; RuntimeError with its message if it failed."""
    done = subprocess.run([program, *args], input=stdin, capture_output=True, check=False)
    if done.returncode < 0:
        raise RuntimeError(f"{program.name}: killed by signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError(done.stderr.decode())
    return done.stdout
