"""What one row times: an op of ours, its peers and the bound, as calls without arguments."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import peers
from benchmarks.duel import MIN_SAMPLE, Call
from benchmarks.peers import COMPILED, COMPILED_OUT, EAGER, IN_PLACE
from emu3_kernels import _native
from tests.budget import assert_as_accurate
from tests.kernels.suite import differentiable, part, public
from tests.kernels.test_all_ops import test_value_and_gradients

READ, COPY, MULTIPLY = "bound: read", "bound: copy", "bound: multiply"
MATRIX = 1024
"""Rows and columns of the matrices whose product bounds an op that counts FLOPs."""
LARGE_RESULT = 1 << 20
"""Bytes from which fresh memory costs: below, a preallocated result is no other contestant."""
WITHOUT_GRADIENT = ("forward", IN_PLACE)
SHORT = 0.1
"""Seconds below which a call is estimated anew, warm and without the profiler."""
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

    def __str__(self) -> str:
        size = "x".join(str(value).replace(" ", "") for value in self.size.values())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{self.backend}-{size}-{dtype}-{self.direction}"


@dataclass
class Lineup:
    """Who is timed, ours first, and who is not and why."""

    calls: dict[str, Call] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float | None] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def enter(self, name: str, call: Call) -> object:
        """Call once for the result, the seconds that a call takes roughly and the memory."""
        if name in (COMPILED, COMPILED_OUT):
            call()
        result, self.seconds[name], peak = observe(call)
        self.peak_mib[name] = None if name in peers.OUTSIDE_TORCH else peak
        self.calls[name] = call
        return result

    def drop(self, name: str, reason: str) -> None:
        self.calls.pop(name, None)
        self.missing[name] = reason


def cases(op: str) -> list[Case]:
    """List every row of ``op``: its backends at the sizes that it states, both ways."""
    entry = peers.FIELDS.get(op, peers.Field())
    stated = part(op, "cases")
    sample = stated.make(**stated.CHECK[0], dtype=entry.dtypes[0], device="cpu")
    directions = entry.directions if differentiable(op, sample) else ("forward",)
    return [
        Case(op, backend, size, dtype, direction)
        for backend in part(op, "api").BACKENDS
        for size in stated.TIME
        for dtype in entry.dtypes
        for direction in directions
    ]


@cache
def check(op: str, backend: str, dtype: torch.dtype) -> None:
    """Raise unless the generic test of ``op`` passes: what is wrong is never timed."""
    level = f"@{_native.cpu_level()}" if backend == "native" and not _native.MISSING else ""
    for size in part(op, "cases").CHECK:
        test_value_and_gradients(op, backend + level, size, dtype, "cpu")


def lineup(case: Case) -> Lineup:
    """Bring everyone who can run ``case`` to its second call, each checked against ours.

    Raises:
        NotImplementedError: our backend cannot run the case.
    """
    inputs = part(case.op, "cases").make(**case.size, dtype=case.dtype, device="cpu")
    ours = caller(case, partial(public(case.op), backend=case.backend), inputs)
    forward = case.direction in WITHOUT_GRADIENT
    entered = Lineup()
    exact = entered.enter(case.backend, ours)
    check(case.op, case.backend, case.dtype)
    low = getattr(part(case.op, "reference"), case.op)(**inputs) if forward else None
    for name, build in rivals(case, inputs, exact).items():
        try:
            result = entered.enter(name, build())
            if forward:
                assert_same(name, case.dtype, result, low, exact)
        except peers.UnavailableError as reason:
            entered.drop(name, str(reason))
        except Exception as error:  # a peer that fails is a result too, and is published
            first_line = (str(error).strip().splitlines() or [""])[0]
            entered.drop(name, f"{type(error).__name__}: {first_line}")
    for name, call in bounds(case).items():
        entered.enter(name, call)
    for name, call in entered.calls.items():
        if entered.seconds[name] < SHORT:
            entered.seconds[name] = estimate(call)
    return entered


def rivals(case: Case, inputs: Mapping, results: object) -> dict[str, Callable[[], Call]]:
    """Name the peers of ``case`` and how each is built; ``results`` is what ours gives."""
    entry = peers.FIELDS.get(case.op, peers.Field())
    if case.direction == IN_PLACE:
        return {name: partial(build, **inputs) for name, build in entry.in_place.items()}
    eager = entry.eager or getattr(part(case.op, "reference"), case.op)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    found: dict[str, Callable[[], Call]] = {
        EAGER: lambda: caller(case, eager, inputs),
        COMPILED: lambda: caller(case, compiled, inputs),
    }
    if case.direction != "forward":
        return found
    if sum(result.nbytes for result in as_tuple(results)) >= LARGE_RESULT:
        found[COMPILED_OUT] = lambda: compiled_into(eager, inputs, results)
    return found | {name: partial(build, **inputs) for name, build in entry.peers.items()}


def caller(case: Case, function: Callable, inputs: Mapping) -> Call:
    """Bind ``function`` to the inputs and, for a backward pass, to random gradients."""
    if case.direction == "forward":
        return partial(function, **inputs)
    if case.direction == IN_PLACE:
        return over_its_inputs(function, inputs)
    leaves = {name: inputs[name].detach().requires_grad_() for name in _leaves(case, inputs)}
    bound = partial(function, **{**inputs, **leaves})
    results = _with_gradient(bound())
    random = torch.Generator().manual_seed(1)
    douts = [torch.randn(r.shape, generator=random).to(r) for r in results]
    wrt = list(leaves.values())
    if case.direction == "backward":
        return lambda: torch.autograd.grad(results, wrt, douts, retain_graph=True)
    return lambda: torch.autograd.grad(_with_gradient(bound()), wrt, douts)


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


def bounds(case: Case) -> dict[str, Call]:
    """Read, and copy, as many bytes as the op must move; or multiply, if it counts FLOPs only."""
    if num_bytes := bytes_moved(case):
        source, half = torch.rand(num_bytes // 4), torch.rand(num_bytes // 8)
        return {READ: source.sum, COPY: partial(torch.empty_like(half).copy_, half)}
    if flops(case):
        left, right = (torch.randn(MATRIX, MATRIX).to(case.dtype) for _ in range(2))
        return {MULTIPLY: partial(torch.mm, left, right)}
    return {}


def bytes_moved(case: Case) -> int | None:
    """Count the bytes that ``case`` must move; they are stated for the forward pass alone."""
    counted = getattr(part(case.op, "cases"), "bytes_moved", None)
    if counted is None or case.direction not in WITHOUT_GRADIENT:
        return None
    return counted(**case.size, dtype=case.dtype)


def flops(case: Case) -> int | None:
    """Count the FLOPs of a product; its backward pass makes two more of the same size."""
    stated = part(case.op, "cases")
    if hasattr(stated, "bytes_moved") or not hasattr(stated, "flops"):
        return None
    products = {"backward": 2, "forward+backward": 3}.get(case.direction, 1)
    return products * stated.flops(**case.size, dtype=case.dtype)


def observe(call: Call) -> tuple[object, float, float]:
    """Call once: the result, the seconds, and the MiB that torch's allocator held at the peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, num_bytes in changes:
        held += num_bytes
        peak = max(peak, held)
    return result, seconds, peak / 2**20


def estimate(call: Call) -> float:
    """Average as many calls as fill a few samples: cold, a short call takes ten times as long."""
    times, elapsed = 1, 0.0
    while elapsed < 5 * MIN_SAMPLE:
        times *= 2
        start = time.perf_counter()
        for _ in range(times):
            call()
        elapsed = time.perf_counter() - start
    return elapsed / times


def assert_same(name: str, dtype: torch.dtype, theirs: object, low: object, ours: object) -> None:
    """Raise unless a peer gives what we give, within the budget of the reference at ``dtype``."""
    for their, plain, our in zip(as_tuple(theirs), as_tuple(low), as_tuple(ours), strict=True):
        if our.is_floating_point():
            assert_as_accurate(name, their.to(dtype), plain.to(dtype), our.double())
        else:
            agreement = (their == our).double().mean().item()
            assert agreement >= SAME_CODES, f"{name}: {agreement:.1%} of its integers are ours"


def as_tuple(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _leaves(case: Case, inputs: Mapping) -> list[str]:
    return differentiable(case.op, dict(inputs))


def _with_gradient(results: object) -> list[Tensor]:
    return [result for result in as_tuple(results) if result.requires_grad]
