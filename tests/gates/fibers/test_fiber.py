"""fiber.h runs correct kernels correctly and detects faulty ones."""

import pytest

from tests.gates.fibers import fiber

SEEDS = range(5)


def outputs(kernel):
    program = fiber.build("kernels_of_test_fiber.cpp")
    return [[int(x) for x in fiber.run(program, kernel, str(s)).split()] for s in SEEDS]


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("reverse", list(range(63, -1, -1))),
        ("sum_tiles", [4 * ((i + 1) % 64) + 6 for i in range(64)]),
        ("reduce", [sum(range(64))] * 64),
    ],
)
def test_a_right_kernel_is_right_in_every_order(kernel, expected):
    assert outputs(kernel) == [expected] * len(SEEDS)


def test_a_missing_barrier_reads_poison():
    assert all(-1 in out for out in outputs("reverse_without_sync"))


@pytest.mark.parametrize("kernel", ["sum_tiles_without_second_sync", "last_writer"])
def test_a_race_differs_from_order_to_order(kernel):
    assert len({tuple(out) for out in outputs(kernel)}) > 1


@pytest.mark.parametrize("kernel", ["divergent", "two_barriers"])
def test_a_barrier_that_some_threads_miss_is_an_error(kernel):
    with pytest.raises(RuntimeError, match=r"waits for ever at line .* do not reach"):
        outputs(kernel)
