"""The machine code of every Triton kernel keeps its contract, and the gate refuses what breaks one.

Nothing here needs a GPU: Triton's wheel brings the assemblers and disassemblers along.
"""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to compile", allow_module_level=True)

from benchmarks import codegen, machine_code
from emu3_kernels.ops import OPS
from emu3_kernels.ops.norm import triton as norm_triton
from emu3_kernels.ops.swiglu import triton as swiglu
from emu3_kernels.runtime.launch import Config, Contract, Tile, meta

ROOT = Path(__file__).parents[2]
GENEROUS = Contract(max_registers=255)


def broken_lines(op: str) -> list[str]:
    rows = list(codegen.count([op]))
    assert {row.target for row in rows} == set(codegen.SHARED_LIMIT)
    return [f"{r.kernel}, {r.config}, {r.target}: {line}" for r in rows for line in r.broken]


@pytest.mark.parametrize("op", [op for op in OPS if find_spec(f"emu3_kernels.ops.{op}.triton")])
@pytest.mark.timeout(900)  # a convolution compiles 30 kernels for each of four targets
def test_every_contract_is_kept(op, compiling):
    assert compiling(broken_lines, op) == []


def held_kernels() -> set[str]:
    modules = [f"emu3_kernels.ops.{op}.triton" for op in OPS]
    configs = [c for name in modules if find_spec(name) for c in import_module(name).CONFIGS]
    launches = [launch for config in configs for launch in codegen.launches_of(config)]
    return {f"{launch.kernel.module}.{launch.kernel.__name__}" for launch in launches}


def test_no_kernel_escapes_the_gate(compiling):
    written = set()
    for path in (ROOT / "emu3_kernels").rglob("*triton.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names = vars(import_module(module))
        written |= {f"{module}.{name}" for name in names if name.endswith("_kernel")}
    assert compiling(held_kernels) == written


def narrow_rows() -> Config:
    """Emu3's vocabulary of 184,622 is twice an odd number: no second row starts at 16 bytes."""
    logits = meta(4, 184622)
    return Config("narrow", lambda: swiglu.forward(logits, logits), {"_fwd_kernel": GENEROUS})


def spilling_rows() -> Config:
    """Backward, 16,384 channels and their sums are more than the registers of 512 threads."""
    x, weight, rstd = meta(64, 16384), meta(16384), meta(64, dtype=torch.float32)

    def call():
        with mock.patch.object(norm_triton, "MAX_BACKWARD", 16384):
            norm_triton.backward(x, x, x, weight, rstd)

    return Config("spilling", call, {"_bwd_kernel": GENEROUS, "_sum_kernel": GENEROUS})


def hoarding_rows() -> Config:
    """Six rows of 8,192 float32 ahead, twice, are 320 KiB."""
    x, weight = (meta(*shape, dtype=torch.float32) for shape in [(64, 8192), (8192,)])
    rstd = meta(64, dtype=torch.float32)

    def call():
        tile = Tile(block=8192, num_warps=16, num_stages=6)
        with mock.patch.object(norm_triton, "row_tile", return_value=tile):
            norm_triton.backward(x, None, x, weight, rstd)

    return Config("hoarding", call, {"_bwd_kernel": GENEROUS, "_sum_kernel": GENEROUS})


def unmet_wishes() -> Config:
    wishes = Contract(max_registers=16, tensor_cores=True, async_copies=True)
    return Config("wishes", swiglu.CONFIGS[0].call, {"_fwd_kernel": wishes})


def needless_exception() -> Config:
    excused = Contract(max_registers=64, exceptions={"sm_90: spills": "it used to spill"})
    return Config("needless", swiglu.CONFIGS[0].call, {"_fwd_kernel": excused})


def lines_of(config: Callable[[], Config], target: str) -> str:
    return "\n".join(
        line for row in codegen.rows_of("faulty", config(), target) for line in row.broken
    )


@pytest.mark.parametrize(
    ("config", "target", "refusals"),
    [
        (narrow_rows, "sm_90", ["loads: must be 16 bytes wide but for 0, got 32x2"]),
        (narrow_rows, "gfx942", ["loads: must be 16 bytes wide but for 0, got 16x2"]),
        (spilling_rows, "sm_90", ["spills: must be none, got"]),
        (hoarding_rows, "sm_80", ["shared: must be at most 166912 bytes, got"]),
        (
            unmet_wishes,
            "sm_100",
            [
                "registers: must be at most 16, got",
                "tensor_cores: must be used, got no matrix opcode",
                "async_copies: must be used, got none",
            ],
        ),
        (needless_exception, "sm_90", ["spills: kept, so the exception on sm_90 must go"]),
    ],
)
def test_the_gate_bites(config, target, refusals, compiling):
    lines = compiling(lines_of, config, target)
    assert [refusal for refusal in refusals if refusal not in lines] == [], lines


def unfused() -> Config:
    def call():
        with mock.patch.object(Tile, "options", return_value={"BLOCK": 1024}):
            swiglu.CONFIGS[0].call()

    return Config("unfused", call, {"_fwd_kernel": GENEROUS})


def test_a_launch_that_leaves_fp_fusion_to_triton_is_refused(compiling):
    with pytest.raises(ValueError, match="unfused must set enable_fp_fusion"):
        compiling(lines_of, unfused, "sm_90")


def uncontracted() -> None:
    codegen.launches_of(Config("bare", swiglu.CONFIGS[0].call, {}))


def test_a_launch_without_a_contract_is_refused(compiling):
    message = r"bare must have a contract for each of \['_fwd_kernel'\], got \[\]"
    with pytest.raises(ValueError, match=message):
        compiling(uncontracted)


def counted_twice() -> tuple[list[codegen.Row], list[codegen.Row]]:
    ops = ("swiglu", "nearest_code")
    return list(codegen.count(ops)), codegen.rows_beside(ops, peers=False)


def test_a_process_for_each_core_counts_what_one_counts(compiling):
    one, many = compiling(counted_twice)
    assert many == one
    listed = [(row.config, row.target) for row in many if row.op == "swiglu"]
    targets = codegen.SHARED_LIMIT
    assert listed == [(config.name, target) for config in swiglu.CONFIGS for target in targets]


def test_a_broken_contract_fails_the_command(tmp_path):
    facts = machine_code.Facts(255, 8, 2, 0, {2: 65}, {16: 1}, {}, 0)
    row = codegen.Row(
        "swiglu", "_fwd_kernel", "x", "sm_90", facts, 9, ("spills: must be none",), ()
    )
    counted = mock.patch.object(codegen, "rows_beside", return_value=[row])
    with counted, pytest.raises(typer.Exit) as stop:
        codegen.codegen(["swiglu"], tmp_path / "rows.json")
    assert stop.value.exit_code == 1
    assert '"COUNTED"' in (tmp_path / "rows.json").read_text()


def peers_rows() -> dict[str, machine_code.Facts]:
    from benchmarks import codegen_peers

    counted = [codegen_peers.rows_of_op("cross_entropy", target) for target in codegen.SHARED_LIMIT]
    return {row.target: row.facts for row in codegen.by_config(counted)}


def test_the_kernels_of_others_are_counted_as_they_are(compiling):
    """Rows of 184,622 classes start off 16 bytes: Liger reads two bytes at a time, and spills."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is in the extra bench")
    facts = compiling(peers_rows)
    assert set(facts) == set(codegen.SHARED_LIMIT)
    assert all(f.loads[2] > 8 and 16 not in f.loads for f in facts.values())
    assert facts["sm_90"].spills
