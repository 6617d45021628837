"""``python -m benchmarks gpu``: nothing that fails on a GPU ends the visit or is hidden."""

import json
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.harness import results, worker
from benchmarks.harness.worker import JobError, Worker
from benchmarks.suites.gpu import command, ops, plan, rows, visit
from benchmarks.suites.gpu.plan import ITEMS
from benchmarks.tests import jobs
from emu3_kernels.ops import OPS
from emu3_kernels.testing.suite import cases


class Here:
    """A worker without a process."""

    def run(self, job, *args, seconds):
        step = "start"
        try:
            for value in job(*args):
                if isinstance(value, str):
                    step = value
                else:
                    yield value
        except Exception as error:
            raise JobError(step, worker.first_line(error), died=False) from error

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(visit, "Worker", Here)


def item_of(op: str) -> plan.Item:
    return next(item for item in ITEMS if item.op == op).as_dry_run()


def run_gpu(folder, *options: str):
    return CliRunner().invoke(front.app, ["gpu", "--dry-run", "--folder", str(folder), *options])


@pytest.mark.e2e
def test_a_dry_run_goes_the_way_of_a_visit(tmp_path, here, monkeypatch):
    """One item of each kind: rows, each with its check, its kernels, its host time; then a page."""
    kinds = {
        item.kind: item for item in reversed(ITEMS) if item.kind != "ops" or item.op == "swiglu"
    }
    monkeypatch.setattr(command, "ITEMS", tuple(kinds.values()))
    done = run_gpu(tmp_path)
    assert done.exit_code == 0, done.output
    stored = results.read(tmp_path / "dry-run.jsonl")
    assert {row["op"] for row in stored} >= {"copy", "read", "GEMM", "model", "decode step"}
    assert {row["label"] for row in stored} == {"DRY RUN"}
    by_op = {row["op"]: row for row in stored}
    assert by_op["swiglu"]["checked"]["width"] == 40
    assert by_op["swiglu"]["host_us"] > 0
    assert by_op["decode step"]["kernels"]
    assert by_op["model"]["kernels"]
    assert by_op["model"]["tokens_per_s"] > 0
    page = (tmp_path / "dry-run.md").read_text()
    assert "**DRY RUN**" in page
    assert "## Kernel time and host time" in page
    assert "## Kernels of model" in page


@pytest.mark.e2e
def test_a_wrong_backend_is_named_and_not_timed_and_the_rest_is(tmp_path, here, monkeypatch):
    wrong, right = item_of("swiglu"), item_of("rms_norm")
    public = ops.suite.public

    def broken(op):
        function = public(op)
        if op != "swiglu":
            return function
        return lambda **given: 1.1 * function(**given)

    monkeypatch.setattr(ops.suite, "public", broken)
    monkeypatch.setattr(command, "ITEMS", (wrong, right))
    done = run_gpu(tmp_path)
    assert done.exit_code == 1
    assert "FAILED: swiglu, num_rows 3, width 40" in done.output
    assert "exceeds its budget" in done.output
    stored = results.read(tmp_path / "dry-run.jsonl")
    assert [row["label"] for row in stored if row["op"] == "swiglu"] == [results.NOT_TIMED]
    assert any(row["label"] == "DRY RUN" for row in stored if row["op"] == "rms_norm")
    assert "exceeds its budget" in (tmp_path / "dry-run.md").read_text()


def a_visit(tmp_path, *items: plan.Item, seconds: float = 100.0) -> visit.Visit:
    made = results.made_by(command.machine.facts(), {"id": "", "dirty": False}, "2000-01-02")
    return visit.Visit(items, "cpu", seconds, tmp_path / "x.jsonl", made, print, print)


def timed(item: plan.Item) -> dict:
    case = rows.case_of(item, "x", "forward", "cpu")
    return {
        "label": "MEASURED", "op": item.op, "backend": "x", "device": "cpu", "size": case.size,
        "dtype": "float32", "direction": "forward", "threads": None, "ms": 1.0, "peers": {},
        "missing": {},
    }  # fmt: skip


def jobs_of(monkeypatch, prepare, measure):
    monkeypatch.setattr(ops, "prepare", prepare)
    monkeypatch.setattr(ops, "measure", measure)


def ready(item, device, skip):
    yield {"default": "x", "missing": dict(skip)}


def test_a_row_is_stored_before_the_next_one_is_measured(tmp_path, here, monkeypatch):
    seen = []

    def measure(item, device, prepared):
        seen.append([row["op"] for row in results.read(tmp_path / "x.jsonl")])
        yield timed(item)
        seen.append([row["op"] for row in results.read(tmp_path / "x.jsonl")])

    jobs_of(monkeypatch, ready, measure)
    a_visit(tmp_path, item_of("swiglu"), item_of("rope")).run(1)
    assert seen == [[], ["swiglu"], ["swiglu"], ["rope", "swiglu"]]


def test_what_does_not_fit_the_time_is_left_out_and_what_still_fits_is_timed(
    tmp_path, here, monkeypatch
):
    def measure(item, device, prepared):
        yield timed(item)

    jobs_of(monkeypatch, ready, measure)
    long, short = replace(item_of("swiglu"), cost=86.0), replace(item_of("rope"), cost=80.0)
    visited = a_visit(tmp_path, long, short)
    visited.run(2)
    assert list(visited.left_out) == [long]
    assert "it takes 86 s, 8" in visited.left_out[long]
    stored = {row["op"]: row["label"] for row in results.read(tmp_path / "x.jsonl")}
    assert stored == {"swiglu": results.NOT_TIMED, "rope": "MEASURED"}


def test_nothing_is_timed_that_was_not_checked_in_time(tmp_path, here, monkeypatch):
    jobs_of(monkeypatch, ready, lambda *_: pytest.fail("timed without a check"))
    visited = a_visit(tmp_path, item_of("swiglu"), seconds=0.0)
    visited.run(1)
    assert list(visited.left_out.values()) == ["not compiled and checked in time"]


def test_a_peer_that_kills_its_process_is_left_out_of_the_next_try(tmp_path, here, monkeypatch):
    def prepare(item, device, skip):
        if "xformers" not in skip:
            yield rows.ENTRY + "xformers"
            raise RuntimeError("no operator found")
        yield {"default": "x", "missing": dict(skip)}

    def measure(item, device, prepared):
        assert prepared["missing"]["xformers"] == "RuntimeError: no operator found"
        if "Liger" not in prepared["missing"]:
            yield rows.ENTRY + "Liger"
            raise RuntimeError("illegal memory access")
        yield timed(item) | {"missing": prepared["missing"]}

    jobs_of(monkeypatch, prepare, measure)
    visited = a_visit(tmp_path, item_of("swiglu"))
    visited.run(1)
    assert not visited.failed
    (row,) = results.read(tmp_path / "x.jsonl")
    assert list(row["missing"]) == ["xformers", "Liger"]


def test_a_failure_of_an_earlier_run_is_forgotten_and_its_rows_are_kept(
    tmp_path, here, monkeypatch
):
    path, item = tmp_path / "x.jsonl", item_of("swiglu")
    results.store(path, [visit.not_timed(item, "lost"), timed(item_of("rope"))])
    jobs_of(monkeypatch, ready, lambda item, *_: iter([timed(item)]))
    a_visit(tmp_path, item).run(1)
    assert [(row["op"], row["label"]) for row in results.read(path)] == [
        ("rope", "MEASURED"),
        ("swiglu", "MEASURED"),
    ]


def test_what_ran_out_of_memory_beside_others_is_tried_again_alone(tmp_path, here, monkeypatch):
    tries = []

    def prepare(item, device, skip):
        tries.append(item.op)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield {"default": "x", "missing": {}}

    jobs_of(monkeypatch, prepare, lambda item, *_: iter([timed(item)]))
    visited = a_visit(tmp_path, item_of("swiglu"))
    visited.run(2)
    assert tries == ["swiglu", "swiglu"]
    assert not visited.failed


@pytest.mark.e2e
def test_a_job_that_raises_dies_or_hangs_is_named_by_its_step_and_the_next_one_runs():
    with closing(Worker()) as one:
        (first, second) = one.run(jobs.count, 2, seconds=60)
        assert (first["number"], second["number"]) == (0, 1)
        with pytest.raises(JobError, match="ZeroDivisionError: division by zero") as raised:
            list(one.run(jobs.divide, seconds=60))
        assert (raised.value.step, raised.value.died) == ("dividing", False)
        (same,) = one.run(jobs.count, 1, seconds=60)
        assert same["process"] == first["process"]
        with pytest.raises(JobError, match="its process ended: signal 11") as raised:
            list(one.run(jobs.die, seconds=60))
        assert (raised.value.step, raised.value.died) == ("dying", True)
        with pytest.raises(JobError, match="took over 0 s") as raised:
            list(one.run(jobs.hang, seconds=0.3))
        assert (raised.value.step, raised.value.died) == ("hanging", True)


@pytest.mark.parametrize("item", ITEMS, ids=str)
def test_every_size_of_the_plan_is_one_of_its_op(item):
    """The inputs are made at the sizes of a dry run and of a check, without memory."""
    if item.kind != "ops":
        return
    stated = cases(item.op)
    tiny = item.as_dry_run()
    stated.make(**tiny.size, dtype=item.dtype, device="cpu")
    assert set(item.check) - {"on_grid"} <= set(item.size)
    assert set(item.tiny) <= set(item.size)


def test_a_visit_covers_every_op_in_its_time():
    ring = {op for op in OPS if not cases(op).time}
    assert {item.op for item in ITEMS} >= set(OPS) - ring
    timing = (1 - visit.PREPARING) * 480 - visit.REPORT
    assert sum(item.cost for item in ITEMS) <= timing
    assert len({str(item) for item in ITEMS}) == len(ITEMS)


def test_without_a_gpu_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(front.app, ["gpu"])
    assert done.exit_code == 1
    assert "--dry-run runs" in done.output


def test_a_number_that_is_stored_is_json(tmp_path):
    item = item_of("swiglu")
    assert json.loads(json.dumps(visit.not_timed(item, "why")))["why"] == "why"
