"""What nvcc makes of the CUDA kernels, for every architecture, without a GPU."""

import re
import shutil
import subprocess
from ast import literal_eval
from dataclasses import asdict
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import getsource
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import triton

from emu3_kernels.ops import OPS
from emu3_kernels.runtime.contracts import Contract, CudaKernel
from emu3_kernels.testing import loops, machine_code
from emu3_kernels.testing.cache import cached
from emu3_kernels.testing.loops import Block
from emu3_kernels.testing.machine_code import Facts, nvidia_facts
from emu3_kernels.testing.terms import Compiled, judge
from tests.gates.compiled import CSRC, version_of, with_includes

TARGETS = ("sm_80", "sm_90", "sm_100")
FLAGS = ("-O3", "-std=c++20", "-Xptxas", "-v", "-cubin")
FAMILIES = sorted(set(OPS.values()))
WITH_CUDA = ("attention", "conv3d", "vq")
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(
    not NVCC, reason="nvcc is not installed: CUDA kernels are not built"
)


def kernels_of(family: str) -> tuple[CudaKernel, ...]:
    """Return the kernels that ``family`` states in its ``contracts.CUDA``; most have none."""
    name = f"emu3_kernels.ops.{family}.contracts"
    return getattr(import_module(name), "CUDA", ()) if find_spec(name) else ()


KERNELS = [pytest.param(k, id=k.kernel) for family in FAMILIES for k in kernels_of(family)]


@cache
def known_targets() -> tuple[str, ...]:
    done = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    return tuple(done.stdout.split())


def facts_of(source: str, target: str) -> Facts:
    """Compile ``source``, which holds one kernel, and count in its machine code."""
    if target not in known_targets():
        pytest.skip(f"this nvcc does not know {target}")

    def count() -> bytes:
        with TemporaryDirectory() as folder:
            path, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
            path.write_text(source)
            command = [NVCC, *FLAGS, f"-I{CSRC}", f"-arch={target}", path, "-o", cubin]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            shared = re.search(r"(\d+) bytes smem", log)
            kernel = cubin.read_bytes(), int(shared[1]) if shared else 0
            return repr(asdict(nvidia_facts([kernel], target)[0])).encode()

    counting = (getsource(machine_code), getsource(loops), triton.__version__)
    key = [*FLAGS, target, version_of(NVCC), *counting, with_includes(source)]
    facts = literal_eval(cached("\n".join(key), count).decode())
    return Facts(**facts | {"blocks": tuple(Block(**block) for block in facts["blocks"])})


def instance(header: str, kernel: str, arguments: str) -> str:
    """Return a source that instantiates ``kernel`` of ``header``, a file of ``csrc/cuda``."""
    (path,) = (CSRC / "cuda").rglob(f"{Path(header).stem}.cuh")
    wanted = f"template __global__ void {kernel}{arguments};"
    return f'#include "{path.relative_to(CSRC)}"\nnamespace emu3 {{ {wanted} }}\n'


@pytest.mark.parametrize("family", WITH_CUDA)
def test_a_family_with_cuda_kernels_states_their_contracts(family):
    assert kernels_of(family)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_keeps_its_contract(kernel, target):
    contract = kernel.contract
    facts = facts_of(instance(kernel.header, kernel.kernel, kernel.arguments), target)
    assert facts.loads.get(contract.access_bytes), f"loads must be of {contract.access_bytes} bytes"
    broken, _ = judge(contract, Compiled(facts, target))
    assert not broken


def test_a_kernel_that_spills_fails():
    """8 queries of 32 dimensions are 256 registers for z alone."""
    spilling = "nearest_code_kernel<float, 32, 8>"
    arguments = "(Latents<float>, const float4*, int, int64_t*)"
    facts = facts_of(instance("nearest_code", spilling, arguments), "sm_90")
    contract = Contract(max_registers=255, scalar_loads=999, scalar_stores=99)
    broken, _ = judge(contract, Compiled(facts, "sm_90"))
    assert [term.split(":")[0] for term in broken] == ["spills"]


def test_a_kernel_with_narrow_loads_fails():
    source = "__global__ void copy(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }\n"
    facts = facts_of(source, "sm_90")
    broken, _ = judge(Contract(max_registers=255), Compiled(facts, "sm_90"))
    assert [term.split(":")[0] for term in broken] == ["loads", "stores"]
