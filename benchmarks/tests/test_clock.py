"""The clocks of the benchmarks, and interleaved rounds on them."""

import inspect
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.utils import load_timer

from benchmarks.harness import clock, interleave


class Clock:
    """A clock that only the entries advance."""

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
def still() -> Clock:
    return Clock()


@pytest.fixture
def stopwatch(still):
    """The fixture of pytest-benchmark itself, on the fake clock."""
    options = dict.fromkeys(inspect.signature(BenchmarkFixture).parameters)
    options |= {"min_time": 0, "max_time": 0, "add_stats": lambda stats: None}
    node = SimpleNamespace(name="row", nodeid="row")
    return BenchmarkFixture(**options | {"node": node, "timer": SimpleNamespace(target=still)})


QUICK = replace(clock.WALL, rest=lambda: None)


def test_rounds_interleave_and_ratios_are_paired(still, stopwatch):
    calls = {"ours": still.spender(1.0, 2.0), "peer": still.spender(3.0, 8.0)}
    taken = interleave.interleave(stopwatch, calls, {"ours": 1.0, "peer": 3.0}, 16.1, QUICK)
    assert taken == {"ours": [1.0, 2.0] * 2, "peer": [3.0, 8.0] * 2}
    assert stopwatch.stats.stats.data == taken["ours"]
    ratio = interleave.paired_ratio(taken["peer"], taken["ours"])
    assert ratio == {"median": 3.5, "min": 3.0, "max": 4.0}


FIVE = interleave.MIN_ROUNDS[0.5]


@pytest.mark.parametrize(("duration", "num_rounds"), [(0.4, 5), (0.6, 3), (9.0, 3), (11.0, 2)])
def test_the_longer_a_round_the_fewer_there_are(still, stopwatch, duration, num_rounds):
    taken = interleave.interleave(
        stopwatch, {"ours": still.spender(duration)}, {"ours": duration}, 0, QUICK
    )
    assert taken["ours"] == pytest.approx([duration] * num_rounds)


def test_a_short_call_is_repeated_within_a_sample(still, stopwatch):
    short = QUICK.min_sample / 4
    taken = interleave.interleave(
        stopwatch, {"ours": still.spender(short)}, {"ours": short}, 0, QUICK
    )
    assert taken["ours"] == pytest.approx([short] * FIVE)
    assert still.now == pytest.approx(FIVE * QUICK.min_sample)


class Event:
    """A CUDA event of a GPU on which every piece of work takes two milliseconds."""

    recorded, synchronised = 0, 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self):
        Event.recorded += 1
        self.at = 2.0 * Event.recorded

    def synchronize(self):
        Event.synchronised += 1

    def elapsed_time(self, later: "Event") -> float:
        return later.at - self.at


def test_a_gpu_is_timed_by_its_events_with_its_cache_emptied_before(monkeypatch, stopwatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    emptied = []
    events = replace(clock.EVENTS, rest=lambda: emptied.append(Event.recorded))
    stopwatch._timer = events.timer
    taken = interleave.interleave(stopwatch, {"ours": lambda: None}, {"ours": 1e-6}, 0, events)
    assert taken == {"ours": [2e-3] * FIVE}
    assert emptied == [0, 2, 4, 6, 8]  # one call a sample: a second would find the cache warm
    assert Event.synchronised == FIVE
    assert clock.EVENTS.rest is clock.flush


def test_pytest_benchmark_finds_both_clocks_by_name():
    assert load_timer(clock.of("cpu").name).target is time.perf_counter
    assert load_timer(clock.of("cuda").name).target is clock.Mark
