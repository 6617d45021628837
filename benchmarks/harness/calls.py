"""Calls without arguments: forward, backward, both in one, or in place.

Imports torch and names of peers alone, so that :mod:`benchmarks.harness.driver` times any commit.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.clock import Call, Clock
from benchmarks.peers.cpu import IN_PLACE

WITHOUT_GRADIENT = ("forward", IN_PLACE)
ESTIMATED = 1e-2
"""Seconds that the calls of an estimate last at least."""


def bind(function: Callable, inputs: Mapping, direction: str, leaves: Sequence[str]) -> Call:
    """Bind ``function`` to ``inputs`` in one direction.

    A backward pass alone gets random gradients in the memory layout of the results, as in training.
    Forward and backward in one differentiate a loss, or half the sum of squares of a tensor.

    Args:
        function: an op, called with ``inputs`` as keywords.
        inputs: its arguments by name.
        direction: "forward", "backward", "forward+backward" or "forward in place".
        leaves: names of the inputs to differentiate.
    """
    if direction == "forward":
        return partial(function, **inputs)
    if direction == IN_PLACE:
        return over_its_inputs(function, inputs)
    wrt = {name: inputs[name].detach().requires_grad_() for name in leaves}
    bound = partial(function, **{**inputs, **wrt})
    if direction == "forward+backward":
        return lambda: _gradients(bound(), list(wrt.values()))
    results = _with_gradient(bound())
    random = torch.Generator(results[0].device).manual_seed(1)
    douts = [torch.empty_like(r).copy_(_normal(r, random)) for r in results]
    return lambda: torch.autograd.grad(results, list(wrt.values()), douts, retain_graph=True)


def over_its_inputs(function: Callable, inputs: Mapping) -> Call:
    """Write the results over copies of the first inputs, which the next call reads."""
    written = list(inputs)[: len(as_tuple(function(**inputs)))]
    written = {name: inputs[name].clone() for name in written}
    return partial(function, **{**inputs, **written}, out=tuple(written.values()))


def estimate(call: Call, clock: Clock) -> float:
    """Return the mean seconds of warm calls; a cold short call takes ten times as long."""
    times = 1
    while (elapsed := clock.seconds(call, times)) < ESTIMATED:
        times *= 2
    return elapsed / times


def as_tuple(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _normal(like: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=random, device=like.device)


def _gradients(results: object, wrt: list[Tensor]) -> tuple[Tensor, ...]:
    results = _with_gradient(results)
    return torch.autograd.grad(results, wrt, [r.detach() if r.dim() else None for r in results])


def _with_gradient(results: object) -> list[Tensor]:
    return [result for result in as_tuple(results) if result.requires_grad]
