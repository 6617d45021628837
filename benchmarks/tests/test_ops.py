"""The benchmark of the ops: what it times, and its arithmetic."""

import json
from dataclasses import replace
from math import inf
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import bounds, calls, clock, entries, machine
from benchmarks.harness.entries import Case, Entries
from benchmarks.harness.rows import row_of
from benchmarks.peers import cpu as peers
from benchmarks.peers import eager
from benchmarks.suites.conftest import pytest_generate_tests as generate
from benchmarks.suites.test_ops import test_op as time_op
from benchmarks.tests.one_row import CASE, IN_BFLOAT16, row
from emu3_kernels.ops import OPS
from emu3_kernels.runtime.cases import Cases
from emu3_kernels.testing import suite
from emu3_kernels.testing.suite import cases


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


def test_an_op_that_counts_flops_is_bound_by_a_gemm(monkeypatch):
    stated = Cases(make=dict, check=(), flops=lambda **size: 640)
    monkeypatch.setattr(bounds, "cases", lambda op: stated)
    both_ways = replace(CASE, direction="forward+backward")
    product = 2 * bounds.MATRIX["cpu"] ** 3
    bound = bounds.bound(both_ways, {"cpu": [2.0], bounds.GEMM: [1.0]})
    assert bound["flops"] == 3 * 640
    assert bound["gemm_tflop_s"] == pytest.approx(product / 1e12)
    assert bound["fraction"] == pytest.approx(3 * 640 / product / 2)


def test_a_decoded_token_is_timed_beside_an_empty_native_call():
    one, many = ({"num_rows": rows, "width": 4096} for rows in (1, 4096))
    assert bounds.EMPTY in bounds.calls(replace(CASE, size=one))
    assert bounds.EMPTY not in bounds.calls(replace(CASE, size=many))
    assert bounds.EMPTY not in bounds.calls(replace(CASE, size=one, direction="backward"))
    taken = {"cpu": [9e-6, 7e-6, 8e-6], "eager": [1e-5] * 3, bounds.EMPTY: [2e-6, 3e-6, 4e-6]}
    timed = Entries(peak_mib=dict.fromkeys(taken, 0.0))
    written = row_of(CASE, 1, [0.5, 1.0], timed, taken, None)
    assert written["above_empty_us"] == pytest.approx(4.0)
    assert set(written["peers"]) == {"eager"}


@pytest.mark.parametrize("op", OPS)
def test_every_row_counts_what_it_must_move_or_multiply(op):
    listed = entries.cases_of(op, scale=True)
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
    plain, scaled = (entries.cases_of("cross_entropy", scale=s) for s in (False, True))
    more = [case for case in scaled if case not in plain]
    assert [case.size for case in more if case.backend == "cpu"] == list(
        cases("cross_entropy").scale
    )
    assert {case.direction for case in more} == {"forward+backward"}


def test_a_decoded_token_is_timed_forward_alone():
    stated = cases("rms_norm")
    ways = [(case.size, case.direction) for case in entries.cases_of("rms_norm")]
    assert {way for size, way in ways if size in stated.decode} == {"forward"}
    assert {way for size, way in ways if size in stated.time} == {"forward", "backward"}


def test_rows_in_succession_share_their_inputs_and_what_the_reference_gives(monkeypatch):
    made, referred = [], []
    stated = Cases(make=lambda **size: made.append(size) or {"x": 2}, check=())
    monkeypatch.setattr(suite, "cases", lambda op: stated)
    monkeypatch.setattr(suite, "reference", lambda op: lambda x: referred.append(x) or 2 * x)
    alike = replace(CASE, backend="triton", direction="forward in place")
    other = replace(CASE, size={"num_rows": 3, "width": 41})
    given = [entries.inputs_of(case) for case in (CASE, alike, other)]
    assert given[0] is given[1]
    assert [size["width"] for size in made] == [40, 41]
    assert [entries.reference_results(case) for case in (other, replace(other))] == [4, 4]
    assert referred == [2]
    entries._inputs.cache_clear()
    entries._reference_results.cache_clear()


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
    scaled = [count for case, count in native if entries.is_scaling(case)]
    assert scaled == [2] * len(cases("cross_entropy").scale)


def test_a_long_call_warmed_by_a_part_is_first_made_in_the_rounds_and_watched_once(monkeypatch):
    called, watched = [], []

    def peak(call):
        watched.append(call)
        return call(), 3 << 20

    timed = Entries(clock=replace(clock.WALL, peak=peak))
    whole, fraction = (lambda n=n: called.append(n) or n for n in ("whole", "part"))
    monkeypatch.setattr(entries, "LONG", 0.0)
    assert timed.add_warm("ours", whole, fraction, 16) == "part"
    assert called == ["part"]
    assert [timed.calls["ours"]() for _ in range(2)] == ["whole", "whole"]
    assert len(watched) == 1
    assert (timed.peak_mib, timed.results) == ({"ours": 3.0}, {"ours": "whole"})
    monkeypatch.setattr(entries, "LONG", 1e9)
    timed.add_warm("peer", whole, fraction, 16)
    assert timed.calls["peer"] is whole
    assert timed.peak_mib["peer"] == 3.0


def test_gemms_are_timed_in_float32_alone_where_bfloat16_takes_minutes(monkeypatch):
    entry = peers.Peers(dtypes=peers.WIDE_AND_NARROW, has_gemm=True)
    for slow, timed in ((True, (torch.float32,)), (False, (torch.float32, torch.bfloat16))):
        monkeypatch.setattr(machine, "SLOW_IN_BFLOAT16", slow)
        assert entries.timed_in(entry, "cpu") == timed
        assert entries.timed_in(entry, "cuda") == entries.timed_in(
            replace(entry, has_gemm=False), "cpu"
        )
        dtypes = {case.dtype for case in entries.cases_of("causal_conv3d")}
        assert dtypes == set(timed)


def test_a_call_of_many_seconds_is_timed_on_the_most_threads_alone(monkeypatch):
    asked = {"--threads": [1, 3], "--seconds": 0.0}
    request = SimpleNamespace(config=SimpleNamespace(getoption=asked.get))
    longest = []
    monkeypatch.setattr(entries, "entries_of", lambda case, most: longest.append(most) or 1 / 0)
    for threads in (3, 1):
        with pytest.raises(ZeroDivisionError):
            time_op(CASE, threads, None, request)
    assert longest == [inf, entries.TOO_LONG]
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="takes over 0 s, on few threads"):
        entries.entries_of(CASE, 0.0)


def test_a_loss_is_computed_and_differentiated_in_every_call():
    case = replace(CASE, op="cross_entropy", direction="forward+backward")
    inputs = cases("cross_entropy").make(tokens=3, classes=8, **IN_BFLOAT16)
    losses = []

    def loss(logits, targets):
        losses.append(eager.cross_entropy(logits, targets))
        return losses[-1]

    call = caller(case, loss, inputs)
    (once,), (again,) = call(), call()
    assert len(losses) == 2
    assert torch.equal(once, again)
    assert once.shape == inputs["logits"].shape
    assert once.ne(0).any()


def test_a_tensor_is_differentiated_as_half_the_sum_of_its_squares():
    given = {"x": torch.tensor([3.0]), "y": torch.tensor([5.0])}
    case = replace(CASE, direction="forward+backward")
    assert caller(case, lambda x, y: x * y, given)() == (15 * 5, 15 * 3)


def caller(case: Case, function, inputs: dict):
    return calls.bind(function, inputs, case.direction, suite.differentiable(case.op, inputs))
