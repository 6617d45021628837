"""Which runs of the benchmark of the ops are published."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.harness import machine, results, run
from benchmarks.tests.one_row import row, session


def stored_threads(folder) -> list[int]:
    """Thread counts of the stored rows."""
    (path,) = folder.iterdir()
    assert path.name == f"{machine.kind()}.jsonl"
    return [row["threads"] for row in results.read(path)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for results, and a session that has timed one row."""

    def run_pytest(asked, stored):
        stored.write_text(json.dumps(session(row())))
        return 0

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "run_pytest", run_pytest)
    monkeypatch.setattr(machine, "load", lambda: 0.0)
    return tmp_path


def run_ops(*options: str):
    return CliRunner().invoke(front.app, ["ops", "--op", "swiglu", "--threads", "1", *options])


def test_a_run_on_a_quiet_machine_is_published(folder):
    assert run_ops().exit_code == 0
    assert stored_threads(folder) == [1]


def test_a_run_on_more_numbers_of_threads_stores_a_row_for_each(folder, monkeypatch):
    def run_pytest(asked, stored):
        rows = [row() | {"threads": count} for count in asked.threads]
        stored.write_text(json.dumps(session(*rows)))
        return 0

    monkeypatch.setattr(run, "run_pytest", run_pytest)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert run_ops("--threads", "2").exit_code == 0
    assert stored_threads(folder) == [1, 2]


def test_a_busy_machine_times_nothing(folder, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 1.2 * machine.cores())
    monkeypatch.setattr(run, "run_pytest", lambda *args: pytest.fail("timed under load"))
    refused = run_ops()
    assert refused.exit_code == 1
    assert f"the load average must be at most {1.1 * machine.cores():.1f}" in refused.output
    assert not list(folder.iterdir())


def test_a_busy_machine_may_print_and_never_writes(folder, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 1.2 * machine.cores())
    printed = run_ops("--allow-load")
    assert printed.exit_code == 0
    assert "eager" in printed.output
    assert not list(folder.iterdir())


def test_load_that_comes_while_timing_is_not_published(folder, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 0)
    monkeypatch.setattr(front, "OPS", ("swiglu",))
    refused = CliRunner().invoke(front.app, ["ops", "--op", "swiglu", "--threads", "0"])
    assert refused.exit_code == 1
    assert "swiglu, 0 threads: the load average must be at most 0.0, 1.1 a core" in refused.output
    assert not list(folder.iterdir())


def test_an_op_whose_suite_failed_is_not_published(folder, monkeypatch):
    monkeypatch.setattr(run, "run_pytest", lambda *args: 1)
    refused = run_ops()
    assert refused.exit_code == 1
    assert "swiglu, 1 threads: no backend could be timed" in refused.output
    assert not list(folder.iterdir())


def test_only_the_threads_that_were_timed_are_stored(folder, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert run_ops("--threads", "2").exit_code == 0
    assert stored_threads(folder) == [1]
