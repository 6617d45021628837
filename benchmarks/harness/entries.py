"""The entries of one row: an op of ours, its peers and the bound, as calls without arguments."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from itertools import takewhile
from math import inf

import torch
from torch import Tensor

from benchmarks.harness import bounds, clock, machine
from benchmarks.harness.calls import WITHOUT_GRADIENT, as_tuple, bind, estimate
from benchmarks.harness.clock import Call, Clock
from benchmarks.harness.worker import first_line
from benchmarks.peers import cpu, gpu
from benchmarks.peers.cpu import COMPILED, COMPILED_OUT, EAGER, IN_PLACE
from emu3_kernels.runtime import library
from emu3_kernels.testing import suite
from emu3_kernels.testing.budget import assert_within, budget

LARGE_RESULT = 1 << 20
"""Bytes from which fresh memory costs time; below, ``torch.compile(out=)`` is not timed."""
SHORT = 0.1
"""Seconds below which a call is estimated again, warm and without the profiler."""
TOO_LONG = 10.0
"""Seconds from which a call of ours is timed on the most threads alone."""
LONG = 1.0
"""Seconds from which the first call is the first round, if a smaller call can warm up."""
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
class Entries:
    """The calls to time, ours first, and the peers that cannot run with the reason."""

    calls: dict[str, Call] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float | None] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    results: dict[str, object] = field(default_factory=dict)
    """Results of the entries that a smaller call warmed up; checked after the rounds."""
    results_mib: float = 0.0
    """Memory of our results, which every entry holds at the end."""
    clock: Clock = clock.WALL

    def add(self, name: str, call: Call) -> object:
        """Call once: return the result, keep a first estimate of the time and the peak memory."""
        if name in (COMPILED, COMPILED_OUT):
            call()
        start = time.perf_counter()
        result, peak = self.clock.peak(call)
        self.seconds[name] = time.perf_counter() - start
        self.peak_mib[name] = None if name in cpu.OUTSIDE_TORCH else peak / 2**20
        self.calls[name] = call
        return result

    def add_warm(self, name: str, call: Call, small: Call, times: float) -> object:
        """Warm up with ``small``, ``times`` less work, and return its result.

        The first round of a long ``call`` is then its first call. That round also measures the peak
        memory: the profiler takes less of a call of seconds than the rounds vary by.
        """
        start = time.perf_counter()
        result = small()
        self.seconds[name] = times * (time.perf_counter() - start)
        if self.seconds[name] < LONG:
            self.results[name] = self.add(name, call)
        else:
            self.calls[name] = partial(self._first_call, name, call)
        return result

    def _first_call(self, name: str, call: Call) -> object:
        self.calls[name] = call
        self.results[name], peak = self.clock.peak(call)
        self.peak_mib[name] = peak / 2**20
        return self.results[name]

    def estimate(self) -> None:
        """Estimate short calls again, warm and without the profiler."""
        for name, call in self.calls.items():
            if self.seconds[name] < SHORT:
                self.seconds[name] = estimate(call, self.clock)

    def drop(self, name: str, reason: str) -> None:
        self.calls.pop(name, None)
        self.missing[name] = reason


def cases_of(op: str, device: str = "cpu", scale: bool = False) -> list[Case]:
    """List every row of ``op``: its backends at its sizes, in every direction.

    Sizes of ``decode`` are timed forward alone. With ``scale``, the sizes of ``scale`` are timed in
    the last direction.
    """
    return [
        Case(op, backend, size, dtype, direction, device)
        for size, direction, dtype in work_of(op, device, scale)
        for backend in own_backends(op)
    ]


def work_of(op: str, device: str, scale: bool = False) -> list[tuple[dict, str, torch.dtype]]:
    """List size, direction and dtype of every row of ``op``."""
    peers, stated = cpu.PEERS.get(op, cpu.Peers()), suite.cases(op)
    dtypes = timed_in(peers, device)
    sample = stated.make(**stated.check[0], dtype=dtypes[0], device="cpu")
    directions = peers.directions if suite.differentiable(op, sample) else ("forward",)
    forward = [direction for direction in directions if direction in WITHOUT_GRADIENT]
    wanted = [(size, direction) for size in stated.time for direction in directions]
    wanted += [(size, direction) for size in stated.decode for direction in forward]
    if scale:
        wanted += [(size, directions[-1]) for size in stated.scale]
    return [(size, direction, dtype) for size, direction in wanted for dtype in dtypes]


def timed_in(peers: cpu.Peers, device: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes that take seconds, not minutes: without AVX-512 no GEMM in bfloat16."""
    return machine.gemm_dtypes(peers.dtypes, device) if peers.has_gemm else peers.dtypes


def own_backends(op: str) -> list[str]:
    """Name the backends of ``op`` that are ours and come before PyTorch's own kernels."""
    ours = takewhile(lambda backend: backend != "aten", suite.backends_of(op))
    return [backend for backend in ours if backend not in suite.LIBRARIES]


def is_scaling(case: Case) -> bool:
    return case.size in suite.cases(case.op).scale


@cache
def check(op: str, backend: str, dtype: torch.dtype, device: str) -> None:
    """Raise unless the generic test of ``op`` passes: a wrong backend is never timed."""
    level = f"@{library.cpu_level()}" if backend == "cpu" and not library.MISSING else ""
    for size in suite.cases(op).check:
        suite.check_call(op, backend + level, size, dtype, device)


def entries_of(case: Case, longest: float = inf) -> Entries:
    """Prepare ours, every peer that can run and the bound; check each peer against ours.

    Raises:
        NotImplementedError: our backend cannot run the case, or a call takes over ``longest``
            seconds.
    """
    inputs = inputs_of(case)
    entries = Entries(clock=clock.of(case.device))
    results = entries.add(case.backend, _ours(case, inputs))
    if entries.seconds[case.backend] > longest:
        raise NotImplementedError(f"{case}: a call takes over {longest:g} s, on few threads")
    entries.results_mib = sum(result.nbytes for result in as_tuple(results)) / 2**20
    check(case.op, case.backend, case.dtype, case.device)
    _add_peers(entries, case, inputs, results)
    for name, call in bounds.calls(case).items():
        entries.add(name, call)
    entries.estimate()
    return entries


def _ours(case: Case, inputs: Mapping) -> Call:
    return bind_case(case, partial(suite.public(case.op), backend=case.backend), inputs)


def bind_case(case: Case, function: Callable, inputs: Mapping) -> Call:
    return bind(function, inputs, case.direction, suite.differentiable(case.op, dict(inputs)))


def _add_peers(entries: Entries, case: Case, inputs: Mapping, results: object) -> None:
    compared = case.direction in WITHOUT_GRADIENT and not _is_random(case.op)
    allowed = with_budgets(case.dtype, results, reference_results(case)) if compared else []
    for name, build in peers_of(case, inputs, results).items():
        try:
            result = entries.add(name, build())
            if compared:
                assert_same(name, case.dtype, result, allowed)
        except cpu.UnavailableError as reason:
            entries.drop(name, str(reason))
        except Exception as error:  # a peer that fails is a result too, and is published
            entries.drop(name, first_line(error))


def _is_random(op: str) -> bool:
    return cpu.PEERS.get(op, cpu.Peers()).is_random


def inputs_of(case: Case) -> dict:
    """Make the inputs of ``case``; rows in succession with the same inputs share them."""
    return _inputs(replace(case, backend="", direction=""))


@lru_cache(maxsize=1)
def _inputs(case: Case) -> dict:
    return suite.cases(case.op).make(**case.size, dtype=case.dtype, device=case.device)


def reference_results(case: Case) -> object:
    """Return the results of the reference, which takes seconds; rows in succession share them."""
    return _reference_results(replace(case, backend="", direction=""))


@lru_cache(maxsize=1)
def _reference_results(case: Case) -> object:
    return suite.reference(case.op)(**_inputs(case))


def forget_inputs() -> None:
    """Free what rows in succession share."""
    _inputs.cache_clear()
    _reference_results.cache_clear()


def peers_of(case: Case, inputs: Mapping, results: object) -> dict[str, Callable[[], Call]]:
    """Return a function that builds each peer of ``case``; ``results`` are ours."""
    peers = cpu.PEERS.get(case.op, cpu.Peers())
    if case.direction == IN_PLACE:
        in_place = peers.in_place if case.device == "cpu" else {}
        return {name: partial(build, **inputs) for name, build in in_place.items()}
    eager = peers.eager or suite.reference(case.op)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    found: dict[str, Callable[[], Call]] = {
        EAGER: lambda: bind_case(case, eager, inputs),
        COMPILED: lambda: bind_case(case, compiled, inputs),
    }
    if uncompiled := peers.uncompiled or (is_scaling(case) and cpu.SCALED):
        found[COMPILED] = partial(cpu.unavailable, uncompiled)
    if case.device == "cuda":
        return found | gpu_peers(case, inputs)
    if case.direction != "forward":
        return found
    large = sum(result.nbytes for result in as_tuple(results)) >= LARGE_RESULT
    if large and not peers.uncompiled:
        found[COMPILED_OUT] = lambda: compiled_into(eager, inputs, results)
    return found | {name: partial(build, **inputs) for name, build in peers.libraries.items()}


def gpu_peers(case: Case, inputs: Mapping) -> dict[str, Callable[[], Call]]:
    """Give every library its own copies of the inputs: some write over them."""
    own = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
    libraries = gpu.PEERS.get(case.op, {}).items()
    return {name: lambda build=build: bind_case(case, build(), own) for name, build in libraries}


def compiled_into(function: Callable, inputs: Mapping, results: object) -> Call:
    """Compile ``function`` with its results copied into existing memory: the copy fuses."""
    outs = [torch.empty_like(result) for result in as_tuple(results)]

    @torch.compile(fullgraph=True, dynamic=False)
    def write(outs: list[Tensor], inputs: dict) -> None:
        for out, result in zip(outs, as_tuple(function(**inputs)), strict=True):
            out.copy_(result)

    def call() -> list[Tensor]:
        write(outs, inputs)
        return outs

    return call


def with_budgets(dtype: torch.dtype, ours: object, low: object) -> list[tuple[Tensor, ...]]:
    """Pair our results with the error that a peer may make: that of the reference at ``dtype``."""
    pairs = []
    for our, plain in zip(as_tuple(ours), as_tuple(low), strict=True):
        exact = our.double() if our.is_floating_point() else our
        pairs.append((exact, budget(plain.to(dtype), exact)))
    return pairs


def assert_same(name: str, dtype: torch.dtype, theirs: object, ours: list) -> None:
    """Raise unless the results of a peer equal ours within their budgets."""
    for their, (our, allowed) in zip(as_tuple(theirs), ours, strict=True):
        assert their.shape == our.shape, name
        if our.is_floating_point():
            assert_within(name, their.to(dtype), our, allowed)
        else:
            agreement = (their == our).double().mean().item()
            assert agreement >= SAME_CODES, f"{name}: {agreement:.1%} of its integers are ours"
