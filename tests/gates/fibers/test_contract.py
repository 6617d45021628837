"""What nvcc makes of the CUDA kernels, for every architecture, without a GPU."""

import json
import re
import shutil
import subprocess

import pytest

from emu3_kernels.runtime.launch import Contract
from emu3_kernels.testing.codegen import judge
from emu3_kernels.testing.machine_code import Facts, nvidia_facts
from tests.gates.fibers.fiber import ROOT

SOURCES = ROOT / "csrc/cuda"
TARGETS = ("sm_80", "sm_90", "sm_100")
KERNELS = [
    pytest.param(path.stem, entry, id=entry["kernel"])
    for path in sorted(SOURCES.glob("*.json"))
    for entry in json.loads(path.read_text())
]
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(
    not NVCC, reason="nvcc is not installed: CUDA kernels are not built"
)


def facts_of(source: str, target: str, folder) -> Facts:
    """Compile ``source``, which holds one kernel, and count in its machine code."""
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    if target not in known.stdout.split():
        pytest.skip(f"this nvcc does not know {target}")
    path, cubin = folder / "kernel.cu", folder / "kernel.cubin"
    path.write_text(source)
    flags = ["-O3", "-std=c++20", f"-I{SOURCES}", f"-arch={target}", "-Xptxas", "-v", "-cubin"]
    command = [NVCC, *flags, str(path), "-o", str(cubin)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    shared = re.search(r"(\d+) bytes smem", log)
    return nvidia_facts(cubin.read_bytes(), int(shared[1]) if shared else 0)


def instance(header: str, kernel: str, arguments: str) -> str:
    wanted = f"template __global__ void {kernel}{arguments};"
    return f'#include "{header}.cuh"\nnamespace emu3 {{ {wanted} }}\n'


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("header", "entry"), KERNELS)
def test_a_kernel_keeps_its_contract(header, entry, target, tmp_path):
    facts = facts_of(instance(header, entry["kernel"], entry["arguments"]), target, tmp_path)
    contract = Contract(**entry["contract"])
    assert facts.loads.get(contract.access_bytes), f"loads must be of {contract.access_bytes} bytes"
    broken, _ = judge(contract, facts, target)
    assert not broken
    assert set(entry["reasons"]) == set(entry["contract"])


def test_a_spilling_kernel_is_refused(tmp_path):
    """8 queries of 32 dimensions are 256 registers for z alone."""
    spilling = "nearest_code_kernel<float, 32, 8>"
    arguments = "(Latents<float>, const float4*, int, int64_t*)"
    facts = facts_of(instance("nearest_code", spilling, arguments), "sm_90", tmp_path)
    contract = Contract(max_registers=255, scalar_loads=999, scalar_stores=1)
    broken, _ = judge(contract, facts, "sm_90")
    assert [term.split(":")[0] for term in broken] == ["spills"]


def test_a_kernel_with_narrow_loads_is_refused(tmp_path):
    source = "__global__ void copy(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }\n"
    facts = facts_of(source, "sm_90", tmp_path)
    broken, _ = judge(Contract(max_registers=255), facts, "sm_90")
    assert [term.split(":")[0] for term in broken] == ["loads", "stores"]
