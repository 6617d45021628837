"""attention at the AMX level on processors without AMX.

The real kernels and bindings run with the tile intrinsics replaced by the plain C++ of amx.h. Where
the processor has AMX, the generic suite tests them as they are.
"""

import subprocess
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from emu3_kernels.runtime import library
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, double, public, reference, value_and_gradients
from tests.gates.compiled import CSRC, CXX, file_of, version_of, with_includes

HERE = Path(__file__).parent
attention = partial(public("attention"), backend="cpu")
KERNELS = [CSRC / "cpu/attention/attention.cpp", CSRC / "cpu/attention/attention_backward.cpp"]
BINDINGS = [CSRC / "bindings/attention.cpp", HERE / "only_amx.cpp"]
FLAGS = ["-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
OF_KERNELS = ["-DEMU3_LEVEL=amx", "-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
OF_BINDINGS = ["-Demu3_kernels=emu3_kernels_amx", "-DTORCH_TARGET_VERSION=0x020B000000000000ULL"]

pytestmark = pytest.mark.skipif(
    "avx512_bf16" not in library.cpu_levels(),
    reason="besides tiles, the AMX level needs AVX-512 with bfloat16",
)


def build() -> Path:
    """Compile the kernels of AMX, and their bindings under a name of their own, as a library."""
    sources = [*KERNELS, *BINDINGS]
    texts = [with_includes(path.read_text()) for path in sources]
    flags = [*FLAGS, *OF_KERNELS, *OF_BINDINGS, torch.__version__, version_of(CXX)]
    key = "\n".join(["amx", *flags, (HERE / "amx.h").read_text(), *texts])
    return file_of(key, link, ".so")


def link() -> bytes:
    compiler = [CXX, *FLAGS, f"-I{CSRC}"]
    of_kernels = [*OF_KERNELS, f"-include{HERE / 'amx.h'}"]
    of_bindings = [*OF_BINDINGS, *(f"-I{path}" for path in include_paths())]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    with TemporaryDirectory() as folder:
        objects = []
        for source in [*KERNELS, *BINDINGS]:
            objects.append(f"{folder}/{len(objects)}.o")
            flags = of_kernels if source in KERNELS else of_bindings
            subprocess.run([*compiler, *flags, "-c", source, "-o", objects[-1]], check=True)
        linked = Path(folder, "library.so")
        subprocess.run([*compiler, "-shared", *objects, *libraries, "-o", linked], check=True)
        return linked.read_bytes()


@pytest.fixture
def on_amx(monkeypatch):
    """Let the cpu backend call the emulated kernels; return the names of the calls."""
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
    oracle = partial(value_and_gradients, "attention", reference("attention"))
    low, exact = oracle(inputs), oracle(double(inputs))
    actual = value_and_gradients("attention", attention, inputs)
    assert calls == ["attention", "attention_backward"]
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])


@pytest.mark.parametrize("dtype", library.DTYPES)
@pytest.mark.parametrize("size", cases("attention").check)
def test_every_size(on_amx, size, dtype):
    check(cases("attention").make(**size, dtype=dtype, device="cpu"), on_amx)


@pytest.mark.parametrize("width", [6, 40, 80, 256])
def test_a_head_dim_that_fills_no_tile(on_amx, width):
    size = {"batch": 1, "queries": 290, "keys": 410, "heads": 4, "groups": 2, "width": width}
    inputs = cases("attention").make(**size, dtype=torch.bfloat16, device="cpu")
    check(inputs | {"scale": 0.3 / width**0.5}, on_amx)


@pytest.mark.parametrize("name", ["k", "v"])
def test_padding_of_a_tile_changes_no_output(on_amx, name):
    """A tile is wider than a head of 40: its padding must not be multiplied by infinity."""
    size = {"batch": 1, "queries": 33, "keys": 33, "heads": 1, "groups": 1, "width": 40}
    inputs = cases("attention").make(**size, dtype=torch.bfloat16, device="cpu")
    inputs[name][:, -1] = torch.inf  # the last query alone attends to it
    out = attention(**inputs)
    assert on_amx == ["attention"]
    assert out[:, :-1].isfinite().all()
    assert not out[:, -1].isfinite().any()
