"""The benchmark of the ops: what it times, what it refuses, and its arithmetic."""

import json
from dataclasses import replace
from math import inf
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks import bounds, clock, contestants, eager, gpu_peers, machine, peers, run
from benchmarks.bounds import COPY, READ
from benchmarks.conftest import pytest_generate_tests as generate
from benchmarks.contestants import Case, Lineup
from benchmarks.test_ops import row as row_of
from benchmarks.test_ops import test_op as time_op
from emu3_kernels.ops import OPS
from emu3_kernels.ops.swiglu import cpu as native
from emu3_kernels.testing.suite import cases, part, reference

CASE = Case("swiglu", "cpu", {"num_rows": 3, "width": 40}, torch.bfloat16, "forward")


def row() -> dict:
    lineup = Lineup(peak_mib={"cpu": 1.5, "eager": 2.5, READ: 0.0, COPY: 0.0})
    lineup.missing["vLLM"] = "not installed"
    taken = {"cpu": [2.0, 4.0], "eager": [6.0, 8.0], READ: [1.0, 3.0], COPY: [4.0, 4.0]}
    return row_of(CASE, 1, [0.5, 1.0], lineup, taken, bounds.bound(CASE, taken))


def test_a_row_holds_everything_that_was_measured():
    written = row()
    assert written["label"] == "MEASURED"
    assert written["backend"].startswith("cpu@")
    assert (written["ms"], written["rounds"], written["load"]) == (3000, 2, [0.5, 1.0])
    assert written["peers"]["eager"]["ratio"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert set(written["peers"]) == {"eager"}
    assert written["bound"]["label"] == "BOUND"
    assert written["bound"]["bytes"] == 3 * 3 * 40 * 2
    assert written["of_bound"] == 0.625  # of the faster way, round by round
    assert written["peers"]["eager"]["of_bound"] == 0.25
    assert written["gb_s"] == pytest.approx(720 / 3 / 1e9)
    assert written["peers"]["eager"]["gb_s"] == pytest.approx(720 / 7 / 1e9)
    assert written["missing"] == {"vLLM": "not installed"}
    assert json.loads(json.dumps(written)) == written


def test_an_op_that_counts_flops_is_bound_by_a_product(monkeypatch):
    stated = SimpleNamespace(flops=lambda **size: 640)
    monkeypatch.setattr(bounds, "part", lambda op, name: stated)
    both_ways = replace(CASE, direction="forward+backward")
    product = 2 * bounds.MATRIX["cpu"] ** 3
    bound = bounds.bound(both_ways, {"cpu": [2.0], bounds.MULTIPLY: [1.0]})
    assert bound["flops"] == 3 * 640
    assert bound["multiply_tflop_s"] == pytest.approx(product / 1e12)
    assert bound["fraction"] == pytest.approx(3 * 640 / product / 2)


def test_a_decoded_token_is_timed_beside_a_native_call_on_no_rows():
    one, many = ({"num_rows": rows, "width": 4096} for rows in (1, 4096))
    assert bounds.EMPTY in bounds.calls(replace(CASE, size=one))
    assert bounds.EMPTY not in bounds.calls(replace(CASE, size=many))
    assert bounds.EMPTY not in bounds.calls(replace(CASE, size=one, direction="backward"))
    taken = {"cpu": [9e-6, 7e-6, 8e-6], "eager": [1e-5] * 3, bounds.EMPTY: [2e-6, 3e-6, 4e-6]}
    lineup = Lineup(peak_mib=dict.fromkeys(taken, 0.0))
    written = row_of(CASE, 1, [0.5, 1.0], lineup, taken, None)
    assert written["above_empty_us"] == pytest.approx(4.0)
    assert set(written["peers"]) == {"eager"}


@pytest.mark.parametrize("op", OPS)
def test_every_row_counts_what_it_must_move_or_multiply(op):
    listed = contestants.cases(op, scale=True)
    assert listed
    for case in listed:
        assert bounds.bytes_moved(case) or bounds.flops(case), case


@pytest.mark.parametrize(
    ("op", "size", "forward", "backward"),
    [
        ("rms_norm", {"num_rows": 3, "width": 40}, 2, 3),
        ("add_rms_norm", {"num_rows": 3, "width": 40}, 4, 4),
        ("swiglu", {"num_rows": 3, "width": 40}, 3, 5),
    ],
)
def test_a_direction_has_traffic_of_its_own(op, size, forward, backward):
    ways = [Case(op, "cpu", size, torch.bfloat16, way) for way in ("forward", "backward")]
    tensor = 3 * 40 * 2
    assert [bounds.bytes_moved(case) for case in ways] == [forward * tensor, backward * tensor]


def test_training_reads_the_logits_once_and_writes_a_gradient_for_every_row():
    size = {"tokens": 4, "classes": 10, "ignored": True}  # of four rows the second is ignored
    case = Case("cross_entropy", "cpu", size, torch.bfloat16, "forward+backward")
    assert bounds.bytes_moved(case) == (3 + 4) * 10 * 2


def test_sizes_of_scale_are_timed_in_the_last_direction_when_asked_for():
    plain, scaled = (contestants.cases("cross_entropy", scale=s) for s in (False, True))
    more = [case for case in scaled if case not in plain]
    assert [case.size for case in more if case.backend == "cpu"] == part(
        "cross_entropy", "cases"
    ).SCALE
    assert {case.direction for case in more} == {"forward+backward"}


def test_nothing_is_compiled_for_a_size_of_scale(monkeypatch):
    monkeypatch.setattr(contestants, "scaled", lambda case: True)
    found = contestants.rivals(replace(CASE, direction="backward"), {}, ())
    with pytest.raises(peers.UnavailableError, match="only show how time and memory grow"):
        found[peers.COMPILED]()


def test_a_decoded_token_is_timed_forward_alone():
    stated = part("rms_norm", "cases")
    ways = [(case.size, case.direction) for case in contestants.cases("rms_norm")]
    assert {way for size, way in ways if size in stated.DECODE} == {"forward"}
    assert {way for size, way in ways if size in stated.TIME} == {"forward", "backward"}


def test_rows_in_succession_share_their_inputs_and_what_the_reference_gives(monkeypatch):
    made, referred = [], []
    stated = {
        "cases": SimpleNamespace(make=lambda **size: made.append(size) or {"x": 2}),
        "reference": SimpleNamespace(swiglu=lambda x: referred.append(x) or 2 * x),
    }
    monkeypatch.setattr(contestants, "part", lambda op, name: stated[name])
    alike = replace(CASE, backend="triton", direction="forward in place")
    other = replace(CASE, size={"num_rows": 3, "width": 41})
    given = [contestants.inputs_of(case) for case in (CASE, alike, other)]
    assert given[0] is given[1]
    assert [size["width"] for size in made] == [40, 41]
    assert [contestants.plain_results(case) for case in (other, replace(other))] == [4, 4]
    assert referred == [2]
    contestants._made.cache_clear()
    contestants._referred.cache_clear()


def test_thread_counts_of_a_case_stand_in_succession_and_scale_is_for_most_threads():
    asked = {"--threads": [1, 2], "--op": ["cross_entropy"], "--device": "cpu", "--scale": True}
    metafunc = SimpleNamespace(
        fixturenames=["case", "threads"],
        config=SimpleNamespace(getoption=asked.get),
        parametrize=lambda names, found, **rest: listed.extend(found),
    )
    listed = []
    generate(metafunc)
    native = [(case, count) for case, count in listed if case.backend == "cpu"]
    (first, two), (second, one) = native[:2]
    assert first == second
    assert (two, one) == (2, 1)
    scaled = [count for case, count in native if contestants.scaled(case)]
    assert scaled == [2] * len(part("cross_entropy", "cases").SCALE)


def test_a_long_call_warmed_by_a_part_is_first_made_in_the_rounds_and_watched_once(monkeypatch):
    called, watched = [], []

    def peak(call):
        watched.append(call)
        return call(), 3 << 20

    lineup = Lineup(clock=replace(clock.WALL, peak=peak))
    whole, fraction = (lambda n=n: called.append(n) or n for n in ("whole", "part"))
    monkeypatch.setattr(contestants, "LONG", 0.0)
    assert lineup.enter_by_part("ours", whole, fraction, 16) == "part"
    assert called == ["part"]
    assert [lineup.calls["ours"]() for _ in range(2)] == ["whole", "whole"]
    assert len(watched) == 1
    assert (lineup.peak_mib, lineup.results) == ({"ours": 3.0}, {"ours": "whole"})
    monkeypatch.setattr(contestants, "LONG", 1e9)
    lineup.enter_by_part("peer", whole, fraction, 16)
    assert lineup.calls["peer"] is whole
    assert lineup.peak_mib["peer"] == 3.0


def test_a_peer_that_the_compiler_leaves_as_it_is_is_not_timed_twice(monkeypatch):
    monkeypatch.setitem(peers.FIELDS, "swiglu", peers.Field(eager.swiglu, uncompiled="same"))
    monkeypatch.setattr(contestants, "LARGE_RESULT", 0)
    lineup = contestants.lineup(CASE)
    assert set(lineup.calls) == {"cpu", "eager", READ, COPY, bounds.EMPTY}
    assert lineup.missing == {peers.COMPILED: "same"}


def test_products_are_timed_in_float32_alone_where_bfloat16_takes_minutes(monkeypatch):
    entry = peers.Field(dtypes=peers.WIDE_AND_NARROW, multiplies=True)
    for slow, timed in ((True, (torch.float32,)), (False, (torch.float32, torch.bfloat16))):
        monkeypatch.setattr(machine, "SLOW_IN_BFLOAT16", slow)
        assert entry.timed_in("cpu") == timed
        assert entry.timed_in("cuda") == replace(entry, multiplies=False).timed_in("cpu")
        dtypes = {case.dtype for case in contestants.cases("causal_conv3d")}
        assert dtypes == set(timed)


def test_a_call_of_many_seconds_is_timed_on_the_most_threads_alone(monkeypatch):
    asked = {"--threads": [1, 3], "--seconds": 0.0}
    request = SimpleNamespace(config=SimpleNamespace(getoption=asked.get))
    longest = []
    monkeypatch.setattr(contestants, "lineup", lambda case, most: longest.append(most) or 1 / 0)
    for threads in (3, 1):
        with pytest.raises(ZeroDivisionError):
            time_op(CASE, threads, None, request)
    assert longest == [inf, contestants.TOO_LONG]
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="takes over 0 s, on few threads"):
        contestants.lineup(CASE, 0.0)


def test_only_the_threads_that_were_timed_are_published(results, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert run_ops("--threads", "2").exit_code == 0
    assert [path.name for path in (results / machine.kind()).iterdir()] == ["swiglu-threads1.json"]


def test_a_loss_is_computed_and_differentiated_in_every_call():
    case = replace(CASE, op="cross_entropy", direction="forward+backward")
    inputs = part("cross_entropy", "cases").make(tokens=3, classes=8, **IN_BFLOAT16)
    losses = []

    def loss(logits, targets):
        losses.append(eager.cross_entropy(logits, targets))
        return losses[-1]

    call = contestants.caller(case, loss, inputs)
    (once,), (again,) = call(), call()
    assert len(losses) == 2
    assert torch.equal(once, again)
    assert once.shape == inputs["logits"].shape
    assert once.ne(0).any()


def test_a_tensor_is_differentiated_as_half_the_sum_of_its_squares():
    given = {"x": torch.tensor([3.0]), "y": torch.tensor([5.0])}
    case = replace(CASE, direction="forward+backward")
    assert contestants.caller(case, lambda x, y: x * y, given)() == (15 * 5, 15 * 3)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for results, and a suite that has always timed one row already."""

    def run_pytest(asked, stored):
        stored.write_text(json.dumps({"benchmarks": [{"name": "row", "extra_info": row()}]}))
        return 0

    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "run_pytest", run_pytest)
    monkeypatch.setattr(machine, "load", lambda: 0.0)
    return tmp_path


def run_ops(*options: str):
    return CliRunner().invoke(front.app, ["ops", "--op", "swiglu", "--threads", "1", *options])


def test_a_run_on_a_quiet_machine_is_published(results):
    assert run_ops().exit_code == 0
    assert [path.name for path in (results / machine.kind()).iterdir()] == ["swiglu-threads1.json"]


def test_a_run_on_more_numbers_of_threads_is_published_in_a_file_for_each(results, monkeypatch):
    def run_pytest(asked, stored):
        rows = [row() | {"threads": count} for count in asked.threads for _ in range(2)]
        stored.write_text(json.dumps({"benchmarks": [{"extra_info": row} for row in rows]}))
        return 0

    monkeypatch.setattr(run, "run_pytest", run_pytest)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert run_ops("--threads", "2").exit_code == 0
    for count in (1, 2):
        path = results / machine.kind() / f"swiglu-threads{count}.json"
        written = json.loads(path.read_text())["benchmarks"]
        assert [timed["extra_info"]["threads"] for timed in written] == [count, count]


def test_a_busy_machine_times_nothing(results, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 1.2 * machine.cores())
    monkeypatch.setattr(run, "run_pytest", lambda *args: pytest.fail("timed under load"))
    refused = run_ops()
    assert refused.exit_code == 1
    assert f"the load average must be at most {1.1 * machine.cores():.1f}" in refused.output
    assert not list(results.iterdir())


def test_a_busy_machine_may_print_and_never_writes(results, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 1.2 * machine.cores())
    printed = run_ops("--allow-load")
    assert printed.exit_code == 0
    assert "eager" in printed.output
    assert not list(results.iterdir())


def test_load_that_comes_while_timing_is_not_published(results, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 0)
    monkeypatch.setattr(front, "OPS", ("swiglu",))
    refused = CliRunner().invoke(front.app, ["ops", "--op", "swiglu", "--threads", "0"])
    assert refused.exit_code == 1
    assert "swiglu, 0 threads: the load average must be at most 0.0, 1.1 a core" in refused.output
    assert not list(results.iterdir())


def test_an_op_whose_suite_failed_is_not_published(results, monkeypatch):
    monkeypatch.setattr(run, "run_pytest", lambda *args: 1)
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
    entry = peers.Field(eager.swiglu, peers.FIELDS["swiglu"].peers)
    monkeypatch.setattr(contestants, "rivals", lambda _, inputs, __: uncompiled(entry, inputs))
    lineup = contestants.lineup(CASE)
    assert set(lineup.calls) == {"cpu", "eager", READ, COPY, bounds.EMPTY}
    assert lineup.missing["vLLM"].endswith(peers.VLLM)
    peers.vllm.cache_clear()


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    entry = peers.Field(lambda gate, up: gate * up)
    monkeypatch.setattr(contestants, "rivals", lambda _, inputs, __: uncompiled(entry, inputs))
    lineup = contestants.lineup(CASE)
    assert "eager" not in lineup.calls
    assert "exceeds its budget" in lineup.missing["eager"]


@pytest.mark.parametrize("op", gpu_peers.PEERS)
def test_a_gpu_peer_that_is_not_installed_is_named_with_what_installs_it(op, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(gpu_peers, "import_module", missing)
    for build in gpu_peers.PEERS[op].values():
        with pytest.raises(peers.UnavailableError, match="cannot be imported: pip install"):
            build()


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "cross_entropy", "linear_cross_entropy"])
def test_liger_takes_what_an_op_of_ours_takes(op, monkeypatch):
    """Its own host code and our adapter run here; its kernels, interpreted or not, do not."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is in the extra bench")
    inputs = cases(op).make(**part(op, "cases").TIME[0] | SMALL[op], **IN_BFLOAT16)
    launches = []
    launched = lambda *args, **options: launches.append(args)  # noqa: E731
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", launched)
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", launched)
    results = contestants.as_tuple(gpu_peers.PEERS[op]["Liger"]()(**inputs))
    assert launches
    plain = contestants.as_tuple(reference(op)(**inputs))
    assert [r.shape for r in results] == [r.shape for r in plain]


IN_BFLOAT16 = {"dtype": torch.bfloat16, "device": "cpu"}
SMALL = {
    "rms_norm": {"num_rows": 2},
    "swiglu": {"num_rows": 2},
    "cross_entropy": {"tokens": 2},
    "linear_cross_entropy": {"tokens": 2, "width": 8, "classes": 33},
}


def test_every_peer_of_a_row_on_a_gpu_has_its_own_inputs(monkeypatch):
    """Liger writes over its inputs: nobody else may see it."""

    def greedy():
        return lambda gate, up: gate.zero_()

    monkeypatch.setattr(gpu_peers, "PEERS", {"swiglu": {"greedy": greedy}})
    inputs = part("swiglu", "cases").make(**CASE.size, dtype=CASE.dtype, device="cpu")
    before = inputs["gate"].clone()
    found = contestants.rivals(replace(CASE, device="cuda"), inputs, inputs["gate"])
    found["greedy"]()()
    assert torch.equal(inputs["gate"], before)


def uncompiled(entry: peers.Field, inputs: dict) -> dict:
    """The rivals of ``entry`` without the compiler, which takes seconds."""
    found = {"eager": lambda: lambda: entry.eager(**inputs)}
    return found | {name: lambda b=build: b(**inputs) for name, build in entry.peers.items()}
