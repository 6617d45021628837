"""What one row times: an op of ours, its peers and the bound, as calls without arguments."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from itertools import takewhile
from math import inf

import torch
from torch import Tensor

from benchmarks import bounds, clock, gpu_peers, peers
from benchmarks.clock import Call, Clock
from benchmarks.peers import COMPILED, COMPILED_OUT, EAGER, IN_PLACE
from emu3_kernels.runtime import library
from emu3_kernels.testing.budget import assert_within, budget
from emu3_kernels.testing.suite import LIBRARIES, differentiable, part, public
from tests.gates.test_all_ops import test_value_and_gradients

LARGE_RESULT = 1 << 20
"""Bytes from which fresh memory costs: below, a preallocated result is no other contestant."""
WITHOUT_GRADIENT = ("forward", IN_PLACE)
SHORT = 0.1
"""Seconds below which a call is estimated anew, warm and without the profiler."""
ESTIMATED = 1e-2
"""Seconds that the calls of an estimate last at least."""
TOO_LONG = 10.0
"""Seconds from which a call of ours is not timed on fewer threads than the most asked for."""
LONG = 1.0
"""Seconds from which a call is too dear to be made before the rounds, if a smaller one can warm."""
SAME_CODES = 0.99
"""Share of integers on which a peer must agree: searches that expand the square miss near-ties."""


@dataclass(frozen=True)
class Case:
    """One row before it is timed."""

    op: str
    backend: str
    size: dict
    dtype: torch.dtype
    direction: str
    device: str = "cpu"

    def __str__(self) -> str:
        size = "x".join(str(value).replace(" ", "") for value in self.size.values())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{self.backend}-{size}-{dtype}-{self.direction}"

    def __hash__(self) -> int:
        return hash(str(self))  # a size is a dict, which has no hash


@dataclass
class Lineup:
    """Who is timed, ours first, and who is not and why."""

    calls: dict[str, Call] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float | None] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    results: dict[str, object] = field(default_factory=dict)
    """What those gave who were warmed up by a part, to be checked after the rounds."""
    results_mib: float = 0.0
    """What the results of ours hold, which everybody holds at the end."""
    clock: Clock = clock.WALL

    def enter(self, name: str, call: Call) -> object:
        """Call once for the result, the seconds that a call takes roughly and the memory."""
        if name in (COMPILED, COMPILED_OUT):
            call()
        start = time.perf_counter()
        result, peak = self.clock.peak(call)
        self.seconds[name] = time.perf_counter() - start
        self.peak_mib[name] = None if name in peers.OUTSIDE_TORCH else peak / 2**20
        self.calls[name] = call
        return result

    def enter_by_part(self, name: str, call: Call, part: Call, times: float) -> object:
        """Warm up with ``part``, which does ``times`` less, and return its result.

        If ``call`` is long, the first round is its first call, and watched for the memory: of
        seconds, the profiler takes a share below what the rounds vary by.
        """
        start = time.perf_counter()
        result = part()
        self.seconds[name] = times * (time.perf_counter() - start)
        if self.seconds[name] < LONG:
            self.results[name] = self.enter(name, call)
        else:
            self.calls[name] = partial(self._watch, name, call)
        return result

    def _watch(self, name: str, call: Call) -> object:
        self.calls[name] = call
        self.results[name], peak = self.clock.peak(call)
        self.peak_mib[name] = peak / 2**20
        return self.results[name]

    def estimate(self) -> None:
        """Estimate short calls anew, warm and unobserved."""
        for name, call in self.calls.items():
            if self.seconds[name] < SHORT:
                self.seconds[name] = estimate(call, self.clock)

    def drop(self, name: str, reason: str) -> None:
        self.calls.pop(name, None)
        self.missing[name] = reason


def cases(op: str, device: str = "cpu", scale: bool = False) -> list[Case]:
    """List every row of ``op``: its backends at the sizes that it states, both ways.

    At the sizes of DECODE, which no training step has, forward alone.
    With ``scale``, the last direction at the sizes of SCALE too, which show how an op grows.
    """
    entry = peers.FIELDS.get(op, peers.Field())
    stated = part(op, "cases")
    dtypes = entry.timed_in(device)
    sample = stated.make(**stated.CHECK[0], dtype=dtypes[0], device="cpu")
    directions = entry.directions if differentiable(op, sample) else ("forward",)
    asked = [(size, direction) for size in stated.TIME for direction in directions]
    forward = [direction for direction in directions if direction in WITHOUT_GRADIENT]
    asked += [(size, way) for size in getattr(stated, "DECODE", ()) for way in forward]
    if scale:
        asked += [(size, directions[-1]) for size in getattr(stated, "SCALE", ())]
    return [
        Case(op, backend, size, dtype, direction, device)
        for size, direction in asked
        for dtype in dtypes
        for backend in ours(op)
    ]


def ours(op: str) -> list[str]:
    """Name the backends of ``op`` to be timed, those that are chosen before PyTorch's own."""
    chosen = takewhile(lambda backend: backend != "aten", part(op, "api").BACKENDS)
    return [backend for backend in chosen if backend not in LIBRARIES]  # which are peers


def scaled(case: Case) -> bool:
    return case.size in getattr(part(case.op, "cases"), "SCALE", ())


@cache
def check(op: str, backend: str, dtype: torch.dtype, device: str) -> None:
    """Raise unless the generic test of ``op`` passes: what is wrong is never timed."""
    level = f"@{library.cpu_level()}" if backend == "cpu" and not library.MISSING else ""
    for size in part(op, "cases").CHECK:
        test_value_and_gradients(op, backend + level, size, dtype, device)


def lineup(case: Case, longest: float = inf) -> Lineup:
    """Bring everyone who can run ``case`` to its second call, each checked against ours.

    Raises:
        NotImplementedError: our backend cannot run the case, or not in ``longest`` seconds.
    """
    inputs = inputs_of(case)
    ours = caller(case, partial(public(case.op), backend=case.backend), inputs)
    forward = case.direction in WITHOUT_GRADIENT
    entered = Lineup(clock=clock.of(case.device))
    results = entered.enter(case.backend, ours)
    if entered.seconds[case.backend] > longest:
        raise NotImplementedError(f"{case}: a call takes over {longest:g} s, on few threads")
    entered.results_mib = sum(result.nbytes for result in as_tuple(results)) / 2**20
    check(case.op, case.backend, case.dtype, case.device)
    allowed = with_budgets(case.dtype, results, plain_results(case)) if forward else []
    for name, build in rivals(case, inputs, results).items():
        try:
            result = entered.enter(name, build())
            if forward:
                assert_same(name, case.dtype, result, allowed)
        except peers.UnavailableError as reason:
            entered.drop(name, str(reason))
        except Exception as error:  # a peer that fails is a result too, and is published
            first_line = (str(error).strip().splitlines() or [""])[0]
            entered.drop(name, f"{type(error).__name__}: {first_line}")
    for name, call in bounds.calls(case).items():
        entered.enter(name, call)
    entered.estimate()
    return entered


def inputs_of(case: Case) -> dict:
    """Make the inputs of ``case``, once for the rows in succession that have the same."""
    return _made(replace(case, backend="", direction=""))


@lru_cache(maxsize=1)
def _made(case: Case) -> dict:
    return part(case.op, "cases").make(**case.size, dtype=case.dtype, device=case.device)


def plain_results(case: Case) -> object:
    """Return what the reference gives, which takes seconds, once for the rows in succession."""
    return _referred(replace(case, backend="", direction=""))


@lru_cache(maxsize=1)
def _referred(case: Case) -> object:
    return getattr(part(case.op, "reference"), case.op)(**_made(case))


def alone(case: Case) -> Lineup:
    """Bring ours to its second call, as it is: beside another commit, values are not compared."""
    inputs = inputs_of(case)
    entered = Lineup(clock=clock.of(case.device))
    ours = partial(public(case.op), backend=case.backend)
    entered.enter(case.backend, caller(case, ours, inputs))
    entered.estimate()
    return entered


def rivals(case: Case, inputs: Mapping, results: object) -> dict[str, Callable[[], Call]]:
    """Name the peers of ``case`` and how each is built; ``results`` is what ours gives."""
    entry = peers.FIELDS.get(case.op, peers.Field())
    if case.direction == IN_PLACE:
        in_place = entry.in_place if case.device == "cpu" else {}
        return {name: partial(build, **inputs) for name, build in in_place.items()}
    eager = entry.eager or getattr(part(case.op, "reference"), case.op)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    found: dict[str, Callable[[], Call]] = {
        EAGER: lambda: caller(case, eager, inputs),
        COMPILED: lambda: caller(case, compiled, inputs),
    }
    if uncompiled := entry.uncompiled or (scaled(case) and peers.SCALED):
        found[COMPILED] = partial(peers.unavailable, uncompiled)
    if case.device == "cuda":
        own = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        return found | {
            name: lambda build=build: caller(case, build(), own)
            for name, build in gpu_peers.PEERS.get(case.op, {}).items()
        }
    if case.direction != "forward":
        return found
    large = sum(result.nbytes for result in as_tuple(results)) >= LARGE_RESULT
    if large and not entry.uncompiled:
        found[COMPILED_OUT] = lambda: compiled_into(eager, inputs, results)
    return found | {name: partial(build, **inputs) for name, build in entry.peers.items()}


def caller(case: Case, function: Callable, inputs: Mapping) -> Call:
    """Bind ``function`` to the inputs and, for a backward pass alone, to random gradients.

    They lie in memory as the results do, which is how training hands them on. Forward and backward
    in one are those of a loss, or of half the sum of squares of a tensor.
    """
    if case.direction == "forward":
        return partial(function, **inputs)
    if case.direction == IN_PLACE:
        return over_its_inputs(function, inputs)
    leaves = {name: inputs[name].detach().requires_grad_() for name in _leaves(case, inputs)}
    bound, wrt = partial(function, **{**inputs, **leaves}), list(leaves.values())
    if case.direction == "forward+backward":
        return lambda: _gradients(bound(), wrt)
    results = _with_gradient(bound())
    random = torch.Generator().manual_seed(1)
    douts = [torch.empty_like(r).copy_(torch.randn(r.shape, generator=random)) for r in results]
    return lambda: torch.autograd.grad(results, wrt, douts, retain_graph=True)


def over_its_inputs(function: Callable, inputs: Mapping) -> Call:
    """Write the results over copies of the first inputs, and read them in the next call."""
    written = list(inputs)[: len(as_tuple(function(**inputs)))]
    written = {name: inputs[name].clone() for name in written}
    return partial(function, **{**inputs, **written}, out=tuple(written.values()))


def compiled_into(function: Callable, inputs: Mapping, results: object) -> Call:
    """Compile ``function`` with its results copied into memory that is there: the copy fuses."""
    outs = [torch.empty_like(result) for result in as_tuple(results)]

    @torch.compile(fullgraph=True, dynamic=False)
    def write(outs: list[Tensor], inputs: dict) -> None:
        for out, result in zip(outs, as_tuple(function(**inputs)), strict=True):
            out.copy_(result)

    def call() -> list[Tensor]:
        write(outs, inputs)
        return outs

    return call


def estimate(call: Call, ticking: Clock) -> float:
    """Average as many calls as fill a few samples: cold, a short call takes ten times as long."""
    times = 1
    while (elapsed := ticking.seconds(call, times)) < ESTIMATED:
        times *= 2
    return elapsed / times


def with_budgets(dtype: torch.dtype, ours: object, low: object) -> list[tuple[Tensor, ...]]:
    """Pair what ours gives with the error that a peer may make: by the reference at ``dtype``."""
    pairs = []
    for our, plain in zip(as_tuple(ours), as_tuple(low), strict=True):
        exact = our.double() if our.is_floating_point() else our
        pairs.append((exact, budget(plain.to(dtype), exact)))
    return pairs


def assert_same(name: str, dtype: torch.dtype, theirs: object, ours: list) -> None:
    """Raise unless a peer gives what we give, within the budget that stands beside it."""
    for their, (our, allowed) in zip(as_tuple(theirs), ours, strict=True):
        assert their.shape == our.shape, name
        if our.is_floating_point():
            assert_within(name, their.to(dtype), our, allowed)
        else:
            agreement = (their == our).double().mean().item()
            assert agreement >= SAME_CODES, f"{name}: {agreement:.1%} of its integers are ours"


def as_tuple(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _leaves(case: Case, inputs: Mapping) -> list[str]:
    return differentiable(case.op, dict(inputs))


def _gradients(results: object, wrt: list[Tensor]) -> tuple[Tensor, ...]:
    results = _with_gradient(results)
    return torch.autograd.grad(results, wrt, [r.detach() if r.dim() else None for r in results])


def _with_gradient(results: object) -> list[Tensor]:
    return [result for result in as_tuple(results) if result.requires_grad]
