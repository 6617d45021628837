"""The machine code of every Triton kernel keeps its contract, and the gate refuses what breaks one.

Nothing here needs a GPU: Triton's wheel contains the assemblers and disassemblers.
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
from emu3_kernels.testing import codegen
from tests.gates import faulty

ROOT = Path(__file__).parents[2]
GENEROUS = Contract(max_registers=255)

pytestmark = pytest.mark.codegen


def calls() -> list:
    """Every op, config and target; the id ends with the family, for ``--family``."""
    return [
        pytest.param(op, i, target, id=f"{op}-{config.name}-{i}-{target}")
        for op in OPS
        for i, config in enumerate(codegen.configs_of(op))
        for target in codegen.SHARED_LIMIT
    ]


def broken_lines(op: str, index: int, target: str) -> list[str]:
    rows = list(codegen.rows_of(op, codegen.configs_of(op)[index], target))
    assert rows, "no kernel was launched"
    return [f"{row.kernel}: {line}" for row in rows for line in row.broken]


@pytest.mark.parametrize(("op", "index", "target"), calls())
def test_every_contract_is_kept(op, index, target, compiling):
    assert compiling(broken_lines, op, index, target) == []


def launched_kernels() -> set[str]:
    configs = [config for op in OPS for config in codegen.configs_of(op)]
    launches = [launch for config in configs for launch in codegen.launches_of(config)]
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


def unmet_terms() -> Config:
    return copied(Contract(max_registers=4, tensor_cores=True, async_copies=True))


def needless_exception() -> Config:
    return copied(Contract(max_registers=64, exceptions={"sm_90: spills": "it used to spill"}))


def lines_of(config: Callable[[], Config], target: str) -> str:
    return "\n".join(
        line for row in codegen.rows_of("faulty", config(), target) for line in row.broken
    )


@pytest.mark.parametrize(
    ("config", "target", "refusals"),
    [
        (narrow_rows, "sm_90", ["loads: must be 16 bytes wide but for 0, got 8x2"]),
        (narrow_rows, "gfx942", ["loads: must be 16 bytes wide but for 0, got 4x2"]),
        (spilling_rows, "sm_90", ["spills: must be none, got"]),
        (hoarding_rows, "sm_80", ["shared: must be at most 166912 bytes, got"]),
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
            rows.append(list(codegen.rows_of("faulty", copied(GENEROUS), "sm_90")))
    kernel._unsafe_update_src(source)
    return rows


def test_facts_are_kept_on_disk_until_the_kernel_is_edited(compiling, tmp_path):
    first, second, edited = compiling(counted_thrice, str(tmp_path))
    assert first == second
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
    assert edited[0].facts.stores[16] == 2 * first[0].facts.stores[16]
