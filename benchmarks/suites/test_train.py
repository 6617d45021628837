"""One test, one row: steps of a recipe of the miniature, packed and padded, ours and theirs."""

import pytest

from benchmarks.harness import machine
from benchmarks.harness.interleave import interleave
from benchmarks.suites import train
from emu3.config import load_recipe
from emu3.train.store_recipe import StoreRecipe


@pytest.mark.parametrize("name", train.RECIPES)
def test_train(name: str, threads: int, benchmark, request: pytest.FixtureRequest) -> None:
    option, before = request.config.getoption, machine.load()
    device, recipe = option("--device"), load_recipe(name, kind=StoreRecipe)
    made = train.steps_of(recipe)
    timed = train.entries_of(recipe, made, device)
    taken = interleave(benchmark, timed.calls, timed.seconds, option("--seconds"), timed.clock)
    loads = [before, machine.load()]
    benchmark.extra_info.update(train.row(recipe, made, timed, taken, threads, loads, device))
