"""Interleaved timing: every round times every entry once, in a new random order.

pytest-benchmark's own loop times one function to the end before the next. Its ``pedantic`` mode
takes the arguments of each round from ``setup``, so here the entry is the argument: one fixture and
one clock give interleaved rounds and paired ratios.
"""

import random
from collections.abc import Mapping
from math import ceil, inf
from statistics import median

from benchmarks.harness.clock import PAUSE, WALL, Call, Clock

MIN_ROUNDS = {0.5: 5, 10.0: 3, inf: 2}
"""Fewest rounds, by the seconds that one takes at most."""
MAX_ROUNDS = 60


def interleave(
    benchmark,
    calls: Mapping[str, Call],
    estimates: Mapping[str, float],
    seconds: float,
    clock: Clock = WALL,
) -> dict[str, list[float]]:
    """Time ``calls`` in interleaved rounds.

    Args:
        benchmark: the fixture of pytest-benchmark; it keeps the samples of the first entry.
        calls: entries by name.
        estimates: rough seconds of one call of each.
        seconds: limit of all rounds together; ``MIN_ROUNDS`` are made anyway.
        clock: of the device; the fixture's timer is its timer.

    Returns:
        Seconds per call of every entry, one number per round.
    """
    order, repeats = schedule(calls, estimates, seconds, clock)
    upcoming = iter(order)

    def next_entry() -> tuple[tuple, dict]:
        name = next(upcoming)
        clock.rest()
        return (calls[name], repeats[name]), {}

    benchmark.pedantic(_repeat, setup=next_entry, rounds=len(order))
    samples = benchmark.stats.stats.data
    taken = by_name(order, samples, repeats)
    samples[:] = taken[next(iter(calls))]
    return taken


def time_rounds(
    calls: Mapping[str, Call], estimates: Mapping[str, float], seconds: float, clock: Clock
) -> dict[str, list[float]]:
    """Time ``calls`` as :func:`interleave` does, outside of pytest."""
    order, repeats = schedule(calls, estimates, seconds, clock)
    samples = []
    for name in order:
        clock.rest()
        samples.append(clock.seconds(calls[name], repeats[name]))
    return by_name(order, samples, repeats)


def schedule(
    calls: Mapping[str, Call], estimates: Mapping[str, float], seconds: float, clock: Clock
) -> tuple[list[str], dict[str, int]]:
    """Return the entries in the order of their samples, and the calls of a sample of each."""
    repeats = {name: max(1, ceil(clock.min_sample / estimates[name])) for name in calls}
    a_round = sum(repeats[name] * estimates[name] + PAUSE for name in calls)
    fewest = next(fewest for longest, fewest in MIN_ROUNDS.items() if a_round <= longest)
    num_rounds = min(MAX_ROUNDS, max(fewest, int(seconds / a_round)))
    shuffled = random.Random(0)
    order = [n for _ in range(num_rounds) for n in shuffled.sample(list(calls), len(calls))]
    return order, repeats


def by_name(
    order: list[str], samples: list[float], repeats: Mapping[str, int]
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in repeats}
    for name, duration in zip(order, samples, strict=True):
        taken[name].append(duration / repeats[name])
    return taken


def paired_ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Summarise their time over ours, round by round."""
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def _repeat(call: Call, times: int) -> None:
    for _ in range(times):
        call()
