"""One test, one row: steps of a recipe of the miniature, packed and padded, ours and theirs."""

import pytest

from benchmarks.harness import machine
from benchmarks.harness.interleave import interleave
from benchmarks.suites import train


@pytest.mark.parametrize("mix", train.MIXES)
def test_train(mix: str, threads: int, benchmark, request: pytest.FixtureRequest) -> None:
    option, before = request.config.getoption, machine.load()
    device, recipe, unequal = option("--device"), train.recipe_of(mix), mix == train.UNEQUAL
    made = train.steps_of(recipe, unequal=unequal)
    timed = train.entries_of(recipe, made, device)
    taken = interleave(benchmark, timed.calls, timed.seconds, option("--seconds"), timed.clock)
    loads = [before, machine.load()]
    given = recipe, made, timed, taken, threads, loads, device
    benchmark.extra_info.update(train.row(*given, unequal=unequal))
