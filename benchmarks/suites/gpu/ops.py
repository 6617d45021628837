"""An op of ours beside its peers: checked against float64 and compiled first, then timed."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from benchmarks.harness import bounds, clock, entries
from benchmarks.harness.calls import WITHOUT_GRADIENT, as_tuple
from benchmarks.harness.clock import Call
from benchmarks.harness.entries import Case, Entries
from benchmarks.harness.worker import first_line, gpu_is_lost
from benchmarks.peers import cpu
from benchmarks.peers.cpu import COMPILED, EAGER
from benchmarks.suites.gpu import rows
from benchmarks.suites.gpu.plan import Item
from benchmarks.suites.gpu.rows import ENTRY
from emu3_kernels.runtime.dispatch import record_backends
from emu3_kernels.testing import suite

OURS = "{} of ours"
"""Entry of a backend that is not the default one."""


def prepare(item: Item, device: str, skip: Mapping[str, str]) -> Iterator:
    """Compare our backends with float64, then call every entry once, which compiles it.

    Yields the default backend of each direction, and why other entries cannot run.

    Raises:
        RuntimeError: a default backend is wrong: the row is not timed.
    """
    with rows.process_state(device):
        missing = dict(skip)
        yield "choosing a backend"
        defaults = {way: default_backend(item, way, device) for way in item.directions}
        yield from _check(item, device, list(defaults.values()), missing)
        _raise_if_missing(defaults, missing)
        inputs = entries.inputs_of(rows.case_of(item, "", "", device))
        for direction, default in defaults.items():
            case = rows.case_of(item, default, direction, device)
            for name, build in builders(item, case, inputs, missing).items():
                yield ENTRY + name
                with torch.set_grad_enabled(direction not in WITHOUT_GRADIENT):
                    _try(name, lambda build=build: build()(), missing)
        _raise_if_missing(defaults, missing)
        yield {"default": defaults, "missing": missing}


def _raise_if_missing(defaults: Mapping[str, str], missing: Mapping[str, str]) -> None:
    for default in defaults.values():
        if default in missing:
            raise RuntimeError(f"{default}: {missing[default]}")


def default_backend(item: Item, direction: str, device: str) -> str:
    """Name the backend that a call without one runs on."""
    inputs = suite.cases(item.op).make(**item.size, dtype=item.dtype, device=device)
    with_gradient = direction not in WITHOUT_GRADIENT
    for name in suite.differentiable(item.op, inputs) if with_gradient else ():
        inputs[name].requires_grad_()
    with record_backends() as chosen, torch.set_grad_enabled(with_gradient):
        suite.public(item.op)(**inputs)
    return chosen[item.op]


def others(item: Item, default: str, device: str) -> list[str]:
    """Name our other backends for the device."""
    own = entries.own_backends(item.op)
    return [name for name in own if name != default and suite.device_of(name) == device]


def _check(item: Item, device: str, defaults: list[str], missing: dict[str, str]) -> Iterator[str]:
    size = {**item.size, **item.check}
    for backend in dict.fromkeys((*defaults, *others(item, "", device))):
        name = backend if backend in defaults else OURS.format(backend)
        if name in missing:
            continue
        yield ENTRY + name
        refusal = _try(name, partial(_refusal, item, backend, size, device), missing)
        if refusal:
            missing[name] = refusal


def _refusal(item: Item, backend: str, size: dict, device: str) -> str | None:
    with torch.enable_grad():
        try:
            return suite.check_call(item.op, backend, size, item.dtype, device)
        except AssertionError as error:
            return str(error)


def _try(name: str, work: Callable, missing: dict[str, str]) -> object:
    try:
        return work()
    except cpu.UnavailableError as reason:
        missing[name] = str(reason)
    except Exception as error:  # an entry that fails is a result, and is published
        if gpu_is_lost():
            raise
        missing[name] = first_line(error)
    return None


def builders(
    item: Item, case: Case, inputs: Mapping, missing: Mapping
) -> dict[str, Callable[[], Call]]:
    """Return what builds the call of each entry that may run, the default backend first."""
    public, peers = suite.public(item.op), cpu.PEERS.get(item.op, cpu.Peers())
    found = {case.backend: lambda: entries.bind_case(case, public, inputs)}
    for name in others(item, case.backend, case.device):
        function = partial(public, backend=name)
        found[OURS.format(name)] = lambda f=function: entries.bind_case(case, f, inputs)
    if inputs.get("document_ids") is None:
        eager = peers.eager or suite.reference(item.op)
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        found[EAGER] = lambda: entries.bind_case(case, eager, inputs)
        found[COMPILED] = lambda: entries.bind_case(case, compiled, inputs)
        if peers.uncompiled == cpu.ONE_OPERATOR:
            found[COMPILED] = partial(cpu.unavailable, peers.uncompiled)
        if item.dry:
            found[COMPILED] = partial(cpu.unavailable, "not compiled in a dry run")
    found |= entries.gpu_peers(case, inputs)
    return {name: build for name, build in found.items() if name not in missing}


def measure(item: Item, device: str, prepared: Mapping) -> Iterator:
    """Yield a row for each direction, and each again with its kernel and host time."""
    with rows.process_state(device):
        timed: list[tuple[dict, Entries, bool]] = []
        for direction in item.directions:
            case = rows.case_of(item, prepared["default"][direction], direction, device)
            with_gradient = direction not in WITHOUT_GRADIENT
            with torch.set_grad_enabled(with_gradient):
                found = Entries(clock=clock.of(device), missing=dict(prepared["missing"]))
                yield from _fill(found, item, case)
                yield "the rounds"
                row = rows.timed_row(item, case, found, bound_of)
            row["checked"] = {**item.size, **item.check}
            timed.append((row, found, with_gradient))
            yield row
        for row, found, with_gradient in timed:
            with torch.set_grad_enabled(with_gradient):
                yield from rows.add_kernel_and_host_time(row, found, device)
            yield row


def _fill(found: Entries, item: Item, case: Case) -> Iterator[str]:
    """Call every entry once; compare the results of a peer with ours."""
    inputs = entries.inputs_of(case)
    ours, allowed = None, []
    for name, build in builders(item, case, inputs, found.missing).items():
        yield ENTRY + name
        try:
            result = found.add(name, build())
            if ours is None:
                ours = result
                found.results_mib = sum(r.nbytes for r in as_tuple(ours)) / 2**20
            elif case.direction in WITHOUT_GRADIENT:
                # As far from ours as eager PyTorch is, ours being within its budget of float64.
                allowed = allowed or entries.with_budgets(
                    case.dtype, ours, result if name == EAGER else ours
                )
                entries.assert_same(name, case.dtype, result, allowed)
        except cpu.UnavailableError as reason:
            found.drop(name, str(reason))
        except Exception as error:  # a peer that fails is a result too, and is published
            if gpu_is_lost() or name == case.backend:
                raise
            found.drop(name, first_line(error))
    if inputs.get("document_ids") is None:
        for name, call in bounds.calls(case).items():
            yield name
            found.add(name, call)


def bound_of(case: Case, taken: dict[str, list[float]]) -> dict | None:
    return bounds.bound(case, taken) if {bounds.READ, bounds.GEMM} & taken.keys() else None
