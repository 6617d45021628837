"""The command that counts machine code, and Liger-Kernel's kernels beside ours."""

import os
from importlib.util import find_spec

import pytest
import typer

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: there is no kernel to compile", allow_module_level=True)

from benchmarks.peers import codegen as peers
from benchmarks.suites import codegen as command
from emu3_kernels.testing import codegen
from emu3_kernels.testing.chips import CHIPS
from emu3_kernels.testing.compilers import compiling  # noqa: F401
from emu3_kernels.testing.loops import Block
from emu3_kernels.testing.machine_code import Facts

pytestmark = pytest.mark.codegen


def counted_twice() -> tuple[list[codegen.Row], list[codegen.Row]]:
    ops = ("swiglu", "nearest_code")
    return list(codegen.count(ops)), command.rows_beside(ops, peers=False)


def test_a_process_for_each_core_counts_what_one_counts(compiling):  # noqa: F811
    one, many = compiling(counted_twice)
    assert many == one
    listed = [(row.config, row.target) for row in many if row.op == "swiglu"]
    configs = [config.name for config in codegen.configs_of("swiglu")]
    assert listed == [(name, target) for name in configs for target in CHIPS]


def test_a_broken_contract_fails_the_command(tmp_path, monkeypatch):
    facts = Facts(255, 8, 2, 0, {2: 65}, {16: 1}, {}, 0, blocks=(Block(0, 9, 2, 16, 0),))
    row = codegen.Row(
        *("swiglu", "swiglu_fwd_kernel", "x", "sm_90", facts),
        num_bytes=9,
        sizes={"x_ptr": 3},
        programs=1,
        num_warps=4,
        resident=1,
        broken=("spills: must be none",),
        excused=(),
    )
    monkeypatch.setattr(command, "rows_beside", lambda *_: [row])
    with pytest.raises(typer.Exit) as stop:
        command.codegen(["swiglu"], tmp_path / "rows.json")
    assert stop.value.exit_code == 1
    assert '"COUNTED"' in (tmp_path / "rows.json").read_text()


def peers_rows() -> dict[str, Facts]:
    counted = [peers.rows_of_op("cross_entropy", target) for target in CHIPS]
    return {row.target: row.facts for row in codegen.by_config(counted)}


def test_the_kernels_of_peers_are_counted_as_they_are(compiling):  # noqa: F811
    """Rows of 184,622 classes are not aligned: Liger reads two bytes at a time, and spills."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is in the extra bench")
    facts = compiling(peers_rows)
    assert set(facts) == set(CHIPS)
    assert all(f.loads[2] > 8 and 16 not in f.loads for f in facts.values())
    assert facts["sm_90"].spills
