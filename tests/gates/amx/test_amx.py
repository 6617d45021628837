"""attention as it runs on processors with AMX: the real kernels and bindings, every tile
instruction replaced by the plain C++ of amx.h; where the processor has AMX, the generic suite runs
them as they are."""

import hashlib
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from emu3_kernels import attention
from emu3_kernels.ops.attention import reference
from emu3_kernels.runtime import library
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, value_and_gradients

CASES = cases("attention")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = [ROOT / "csrc/cpu/attention.cpp", ROOT / "csrc/cpu/attention_backward.cpp"]
BINDINGS = [ROOT / "csrc/bindings/attention.cpp", HERE / "only_amx.cpp"]

pytestmark = pytest.mark.skipif(
    "avx512_bf16" not in library.cpu_levels(),
    reason="beside its tiles, the AMX level needs a processor with AVX-512 and bfloat16",
)


def build() -> Path:
    """Compile the kernels of AMX, and their bindings under a name of their own, as a library."""
    flags = ["-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
    target = ["-DEMU3_LEVEL=amx", "-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
    torchs = ["-Demu3_kernels=emu3_kernels_amx", "-DTORCH_TARGET_VERSION=0x020B000000000000ULL"]
    torchs += [f"-I{path}" for path in include_paths()]
    headers = [*(ROOT / "csrc").glob("*/*.h"), HERE / "amx.h"]
    content = b"".join(path.read_bytes() for path in [*sorted(headers), *KERNELS, *BINDINGS])
    name = hashlib.sha256(content + Path(__file__).read_bytes()).hexdigest()[:16]
    library = ROOT / "build/amx" / f"{name}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    scratch = library.with_suffix(f".{os.getpid()}")
    compiler = [os.environ.get("CXX", "c++"), *flags]
    objects = []
    for source in [*KERNELS, *BINDINGS]:
        objects.append(f"{scratch}.{source.parent.name}.{source.stem}.o")
        own = [*target, f"-include{HERE / 'amx.h'}"] if source in KERNELS else torchs
        subprocess.run([*compiler, *own, "-c", source, "-o", objects[-1]], check=True)
    linked = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*compiler, "-shared", *objects, *linked, "-o", scratch], check=True)
    scratch.rename(library)
    return library


@pytest.fixture
def on_amx(monkeypatch):
    """Let the native backend call the emulated kernels; says how often it did."""
    torch.ops.load_library(build())
    calls = []
    for name in ("attention", "attention_backward"):
        emulated = getattr(torch.ops.emu3_kernels_amx, name)

        def call(*args, name=name, emulated=emulated):
            calls.append(name)
            return emulated(*args)

        monkeypatch.setattr(torch.ops.emu3_kernels, name, call)
    return calls


def check(inputs, calls):
    oracle = partial(value_and_gradients, "attention", reference.attention)
    low, exact = oracle(inputs), oracle(double(inputs))
    actual = value_and_gradients("attention", partial(attention, backend="cpu"), inputs)
    assert calls == ["attention", "attention_backward"]
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


@pytest.mark.parametrize("dtype", library.DTYPES)
@pytest.mark.parametrize("size", CASES.check)
def test_every_size(on_amx, size, dtype):
    check(CASES.make(**size, dtype=dtype, device="cpu"), on_amx)


@pytest.mark.parametrize("width", [6, 40, 80, 256])
def test_widths_that_fill_no_tile(on_amx, width):
    size = {"batch": 1, "queries": 290, "keys": 410, "heads": 4, "groups": 2, "width": width}
    inputs = CASES.make(**size, dtype=torch.bfloat16, device="cpu")
    check(inputs | {"scale": 0.3 / width**0.5}, on_amx)


@pytest.mark.parametrize("name", ["k", "v"])
def test_padding_lets_nothing_through(on_amx, name):
    """A tile is wider than a head of 40: what lies beside it may be infinite."""
    size = {"batch": 1, "queries": 33, "keys": 33, "heads": 1, "groups": 1, "width": 40}
    inputs = CASES.make(**size, dtype=torch.bfloat16, device="cpu")
    inputs[name][:, -1] = torch.inf  # seen by the last query alone
    out = attention(**inputs, backend="cpu")
    assert on_amx == ["attention"]
    assert out[:, :-1].isfinite().all()
    assert not out[:, -1].isfinite().any()
