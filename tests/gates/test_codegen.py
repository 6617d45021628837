"""The machine code of every Triton kernel keeps its contract, and the gate refuses what breaks one.

Every kernel is compiled by the installed Triton and by the oldest that we support. Nothing here
needs a GPU: Triton's wheel contains the assemblers and disassemblers.
"""

import ast
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to compile", allow_module_level=True)

from emu3_kernels.ops import OPS
from emu3_kernels.runtime.contracts import Config, Contract, meta
from emu3_kernels.runtime.launch import assume_gpu
from emu3_kernels.testing import codegen
from emu3_kernels.testing.chips import CHIPS
from emu3_kernels.testing.compilers import COMPILED, INSTALLED, OLDEST
from tests.gates import faulty

ROOT = Path(__file__).parents[2]
GENEROUS = Contract(max_registers=255)

pytestmark = pytest.mark.codegen


TRITONS = (INSTALLED, OLDEST)


AT_ONCE = 4
"""Configs of a test, which are disassembled together; each may compile for seconds."""


def calls() -> list:
    """Every op, config, target and Triton; the id starts with the op, for ``--family``."""
    return [
        pytest.param(op, first, target, triton, id=f"{op}-{first}-{target}-{triton}")
        for op in OPS
        for first in range(0, len(codegen.configs_of(op)), AT_ONCE)
        for target in CHIPS
        for triton in TRITONS
    ]


def judged(op: str, first: int, target: str) -> tuple[list[int], list[str]]:
    """Return how many launches each config has, and a line for each term that one breaks."""
    configs = codegen.configs_of(op)[first : first + AT_ONCE]
    configs = [config for config in configs if config.is_for(target)]
    rows = codegen.rows_of(op, configs, target)
    broken = [
        f"{config.name}, {row.kernel}: {line}"
        for config, of_config in zip(configs, rows, strict=True)
        for row in of_config
        for line in row.broken
    ]
    return [len(of_config) for of_config in rows], broken


@pytest.mark.parametrize(("op", "first", "target", "triton"), calls())
def test_every_contract_is_kept(op, first, target, triton, compiling_with, record_property):
    num_launches, broken = compiling_with(triton, judged, op, first, target)
    record_property(COMPILED, sum(num_launches))
    assert all(num_launches), "no kernel was launched"
    assert broken == []


def launched_kernels() -> set[str]:
    launches = []
    for config in (config for op in OPS for config in codegen.configs_of(op)):
        with assume_gpu(CHIPS[(*config.targets, "sm_90")[0]].gpu):
            launches += codegen.launches_of(config)
    return {f"{launch.kernel.module}.{launch.kernel.__name__}" for launch in launches}


def test_no_kernel_escapes_the_gate(compiling):
    written = set()
    for path in (ROOT / "emu3_kernels").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        kernels = [f.name for f in functions if f.decorator_list and f.name.endswith("_kernel")]
        written |= {f"{module}.{name}" for name in kernels}
    assert compiling(launched_kernels) == written


def narrow_rows() -> Config:
    """Emu3's vocabulary of 184,622 is twice an odd number: rows are not 16-byte aligned."""
    call = lambda: faulty.copy_rows(meta(4, 184622))  # noqa: E731
    return Config("narrow", call, {"copy_rows_kernel": GENEROUS})


def spilling_rows() -> Config:
    return Config("spilling", lambda: faulty.spill(meta(16384)), {"spilling_kernel": GENEROUS})


def hoarding_rows() -> Config:
    x = meta(64, 8192, dtype=torch.float32)
    return Config("hoarding", lambda: faulty.hoard(x, x), {"hoarding_kernel": GENEROUS})


def copied(contract: Contract) -> Config:
    return Config("copy", lambda: faulty.copy_rows(meta(4, 1024)), {"copy_rows_kernel": contract})


def serialised_tiles() -> Config:
    x = meta(16384, 128)
    return Config("serialised", lambda: faulty.serialise(x), {"serialised_kernel": GENEROUS})


def few_programs() -> Config:
    """A row for each of Emu3's 32 heads."""
    return Config("few", lambda: faulty.copy_rows(meta(32, 1024)), {"copy_rows_kernel": GENEROUS})


def unmet_terms() -> Config:
    return copied(Contract(max_registers=4, tensor_cores=True, async_copies=True))


def needless_exception() -> Config:
    return copied(Contract(max_registers=64, exceptions={"sm_90: spills": "it used to spill"}))


def lines_of(config: Callable[[], Config], target: str) -> str:
    return "\n".join(
        line for row in codegen.rows_of("faulty", [config()], target)[0] for line in row.broken
    )


@pytest.mark.parametrize(
    ("config", "target", "refusals"),
    [
        (narrow_rows, "sm_90", ["loads: must be 16 bytes wide but for 0, got 8x2"]),
        (narrow_rows, "gfx942", ["loads: must be 16 bytes wide but for 0, got 4x2"]),
        (spilling_rows, "sm_90", ["spills: must be none, got"]),
        (hoarding_rows, "sm_80", ["shared: must be at most 166912 bytes, got"]),
        (serialised_tiles, "sm_90", ["serialised: must wait once for 2 HGMMA or more, got"]),
        (few_programs, "sm_90", ["programs: must fill 132 SMs, got 32"]),
        (
            unmet_terms,
            "sm_100",
            [
                "registers: must be at most 4, got",
                "tensor_cores: must be used, got no matrix opcode",
                "async_copies: must be used, got none",
            ],
        ),
        (needless_exception, "sm_90", ["spills: kept, so the exception on sm_90 must go"]),
    ],
)
def test_the_gate_refuses(config, target, refusals, compiling):
    lines = compiling(lines_of, config, target)
    assert [refusal for refusal in refusals if refusal not in lines] == [], lines


def newer_call() -> Config:
    x = meta(1024)
    return Config("newer", lambda: faulty.call_newer(x), {"newer_kernel": GENEROUS})


def test_a_call_that_the_oldest_triton_lacks_is_refused(compiling_with):
    assert "spills" not in compiling_with(INSTALLED, lines_of, newer_call, "sm_90")
    with pytest.raises(Exception, match="has no attribute 'to_tensor'"):
        compiling_with(OLDEST, lines_of, newer_call, "sm_90")


def excused_on_one_version() -> Config:
    key = f"sm_90, triton {OLDEST.removesuffix('.0')}: registers"
    contract = Contract(max_registers=4, few_programs="four rows", exceptions={key: "a reason"})
    return copied(contract)


def test_an_exception_may_name_a_version(compiling_with):
    assert compiling_with(OLDEST, lines_of, excused_on_one_version, "sm_90") == ""
    refused = compiling_with(INSTALLED, lines_of, excused_on_one_version, "sm_90")
    assert refused.startswith("registers: must be at most 4, got")


def unfused() -> Config:
    def call() -> None:
        x = meta(4, 1024)
        faulty.copy_rows_kernel[(4,)](x, x, 1024, 1024, BLOCK=1024)

    return Config("unfused", call, {"copy_rows_kernel": GENEROUS})


def test_a_launch_that_leaves_fp_fusion_to_triton_is_refused(compiling):
    with pytest.raises(ValueError, match="unfused must set enable_fp_fusion"):
        compiling(lines_of, unfused, "sm_90")


def uncontracted() -> None:
    codegen.launches_of(Config("bare", lambda: faulty.copy_rows(meta(4, 1024)), {}))


def test_a_launch_without_a_contract_is_refused(compiling):
    message = r"bare must have a contract for each of \['copy_rows_kernel'\], got \[\]"
    with pytest.raises(ValueError, match=message):
        compiling(uncontracted)


def counted_thrice(folder: str) -> list[list[codegen.Row]]:
    """The facts of one config: compiled, read from the disk, and compiled after an edit."""
    kernel = faulty.copy_rows_kernel
    source = kernel.src
    edited = source.replace("    tl.store(", "    tl.store(y_ptr + column, x)\n    tl.store(")
    rows = []
    with mock.patch.dict(os.environ, EMU3_TEST_CACHE=folder):
        for text in (source, source, edited):
            kernel._unsafe_update_src(text)
            rows += codegen.rows_of("faulty", [copied(GENEROUS)], "sm_90")
    kernel._unsafe_update_src(source)
    return rows


def test_facts_are_kept_on_disk_until_the_kernel_is_edited(compiling, tmp_path):
    first, second, edited = compiling(counted_thrice, str(tmp_path))
    assert first == second
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
    assert edited[0].facts.stores[16] == 2 * first[0].facts.stores[16]
