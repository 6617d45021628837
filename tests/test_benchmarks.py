"""The benchmark of the ops: what it times, what it refuses, and its arithmetic."""

import inspect
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks import contestants, duel, machine, peers, report, test_ops
from benchmarks.contestants import COPY, READ, Case, Lineup
from emu3_kernels.ops.swiglu import native

CASE = Case("swiglu", "native", {"num_rows": 3, "width": 40}, torch.bfloat16, "forward")


class Clock:
    """A clock that stands still but for what the contestants spend."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def spender(self, *durations: float):
        """Return a call that takes each of ``durations`` in turn."""
        turns = iter(durations * 1000)

        def call():
            self.now += next(turns)

        return call


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stopwatch(clock):
    """The fixture of pytest-benchmark itself, on the fake clock."""
    options = dict.fromkeys(inspect.signature(BenchmarkFixture).parameters)
    options |= {"min_time": 0, "max_time": 0, "add_stats": lambda stats: None}
    node = SimpleNamespace(name="row", nodeid="row")
    return BenchmarkFixture(**options | {"node": node, "timer": SimpleNamespace(target=clock)})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(duel, "PAUSE", 0)


def test_rounds_interleave_and_ratios_are_paired(clock, stopwatch, quick):
    calls = {"ours": clock.spender(1.0, 2.0), "peer": clock.spender(3.0, 8.0)}
    taken = duel.interleave(stopwatch, calls, {"ours": 1.0, "peer": 3.0}, seconds=16.0)
    assert taken == {"ours": [1.0, 2.0] * 2, "peer": [3.0, 8.0] * 2}
    assert stopwatch.stats.stats.data == taken["ours"]
    ratio = duel.paired_ratio(taken["peer"], taken["ours"])
    assert ratio == {"median": 3.5, "min": 3.0, "max": 4.0}


def test_a_short_call_is_repeated_within_a_sample(clock, stopwatch, quick):
    calls = {"ours": clock.spender(duel.MIN_SAMPLE / 4)}
    taken = duel.interleave(stopwatch, calls, {"ours": duel.MIN_SAMPLE / 4}, seconds=0)
    assert taken["ours"] == pytest.approx([duel.MIN_SAMPLE / 4] * duel.MIN_ROUNDS)
    assert clock.now == pytest.approx(duel.MIN_ROUNDS * duel.MIN_SAMPLE)


def row() -> dict:
    lineup = Lineup(peak_mib={"native": 1.5, "eager": 2.5, READ: 0.0, COPY: 0.0})
    lineup.missing["vLLM"] = "not installed"
    taken = {"native": [2.0, 4.0], "eager": [6.0, 8.0], READ: [1.0, 3.0], COPY: [4.0, 4.0]}
    return test_ops.row(CASE, 1, [0.5, 1.0], lineup, taken)


def test_a_row_holds_everything_that_was_measured():
    written = row()
    assert written["label"] == "MEASURED"
    assert written["backend"].startswith("native@")
    assert (written["ms"], written["rounds"], written["load"]) == (3000, 2, [0.5, 1.0])
    assert written["peers"]["eager"]["ratio"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert set(written["peers"]) == {"eager"}
    assert written["bound"]["bytes"] == 3 * 3 * 40 * 2
    assert written["bound"]["fraction"] == 0.625  # of the faster way, round by round
    assert written["missing"] == {"vLLM": "not installed"}
    assert json.loads(json.dumps(written)) == written


def test_an_op_that_counts_flops_is_bound_by_a_product(monkeypatch):
    stated = SimpleNamespace(flops=lambda **size: 640)
    monkeypatch.setattr(contestants, "part", lambda op, name: stated)
    both_ways = replace(CASE, direction="forward+backward")
    product = 2 * contestants.MATRIX**3
    bound = test_ops.bound(both_ways, {"native": [2.0], contestants.MULTIPLY: [1.0]})
    assert bound["flops"] == 3 * 640
    assert bound["multiply_tflop_s"] == pytest.approx(product / 1e12)
    assert bound["fraction"] == pytest.approx(3 * 640 / product / 2)


def test_a_report_names_machine_peers_and_who_is_missing(tmp_path):
    run = {
        "machine_info": machine.facts(),
        "commit_info": machine.commit(),
        "datetime": "2000-01-02T03:04:05",
        "benchmarks": [{"extra_info": row()}],
    }
    report.publish(tmp_path, "swiglu", 1, run)
    page = report.write_markdown(tmp_path).read_text()
    assert machine.processor() in page
    assert "2.50x (2.00-3.00)" in page
    assert "Not timed: vLLM (forward): not installed" in page


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for results, and a suite that has always timed one row already."""

    def run_pytest(op, threads, seconds, stored):
        stored.write_text(json.dumps({"benchmarks": [{"name": "row", "extra_info": row()}]}))
        return 0

    monkeypatch.setattr(front, "RESULTS", tmp_path)
    monkeypatch.setattr(front, "run_pytest", run_pytest)
    monkeypatch.setattr(machine, "load", lambda: 0.0)
    return tmp_path


def run_ops(*options: str):
    return CliRunner().invoke(front.app, ["ops", "--op", "swiglu", "--threads", "1", *options])


def test_a_run_on_a_quiet_machine_is_published(results):
    assert run_ops().exit_code == 0
    assert [path.name for path in results.iterdir()] == ["swiglu-threads1.json"]


def test_a_busy_machine_times_nothing(results, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: machine.cores() + 0.1)
    monkeypatch.setattr(front, "run_pytest", lambda *args: pytest.fail("timed under load"))
    refused = run_ops()
    assert refused.exit_code == 1
    assert f"the load average must be at most {machine.cores()}" in refused.output
    assert not list(results.iterdir())


def test_a_busy_machine_may_print_and_never_writes(results, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: machine.cores() + 0.1)
    printed = run_ops("--allow-load")
    assert printed.exit_code == 0
    assert "eager" in printed.output
    assert not list(results.iterdir())


def test_load_that_comes_while_timing_is_not_published(results, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 0)
    monkeypatch.setattr(front, "OPS", ("swiglu",))
    refused = CliRunner().invoke(front.app, ["ops", "--op", "swiglu", "--threads", "0"])
    assert refused.exit_code == 1
    assert "swiglu, 0 threads: the load average must be at most 0, one a core" in refused.output
    assert not list(results.iterdir())


def test_an_op_whose_suite_failed_is_not_published(results, monkeypatch):
    monkeypatch.setattr(front, "run_pytest", lambda *args: 1)
    refused = run_ops()
    assert refused.exit_code == 1
    assert "swiglu, 1 threads: no backend could be timed" in refused.output
    assert not list(results.iterdir())


def test_a_backend_that_fails_its_check_is_not_timed(monkeypatch):
    right = native.forward
    monkeypatch.setattr(native, "forward", lambda gate, up: 1.1 * right(gate, up))
    contestants.check.cache_clear()
    with pytest.raises(AssertionError, match="exceeds its budget"):
        contestants.lineup(CASE)
    contestants.check.cache_clear()


def test_a_peer_that_cannot_run_is_named_with_its_reason(monkeypatch):
    peers.vllm.cache_clear()
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    entry = peers.Field(peers.swiglu, peers.FIELDS["swiglu"].peers)
    monkeypatch.setattr(
        contestants, "rivals", lambda case, inputs, results: uncompiled(entry, inputs)
    )
    lineup = contestants.lineup(CASE)
    assert set(lineup.calls) == {"native", "eager", READ, COPY}
    assert lineup.missing["vLLM"].endswith(peers.VLLM)
    peers.vllm.cache_clear()


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    entry = peers.Field(lambda gate, up: gate * up)
    monkeypatch.setattr(
        contestants, "rivals", lambda case, inputs, results: uncompiled(entry, inputs)
    )
    lineup = contestants.lineup(CASE)
    assert "eager" not in lineup.calls
    assert "exceeds its budget" in lineup.missing["eager"]


def uncompiled(entry: peers.Field, inputs: dict) -> dict:
    """The rivals of ``entry`` without the compiler, which takes seconds."""
    found = {"eager": lambda: lambda: entry.eager(**inputs)}
    return found | {name: lambda b=build: b(**inputs) for name, build in entry.peers.items()}


def test_the_process_starts_again_with_one_allocator_for_all(monkeypatch):
    started = {}
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def execve(path, arguments, environment):
        started.update(environment)
        raise SystemExit

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        front.main()
    assert started.items() >= front.ALLOCATOR.items()
    assert "TRITON_INTERPRET" not in started
