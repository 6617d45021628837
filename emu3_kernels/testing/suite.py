"""The generic suite: values and every gradient of an op against its reference at float64.

Tests and benchmarks call it, and whoever adds a backend: ``check_backend("swiglu", "mine")``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

import emu3_kernels
from emu3_kernels.ops import OPS
from emu3_kernels.runtime import dispatch, library
from emu3_kernels.runtime.cases import Cases
from emu3_kernels.runtime.dispatch import path_of
from emu3_kernels.testing.budget import assert_as_accurate

LIBRARIES = ("flash_attn", "xformers", "sdpa", "aten")
"""Backends that are the ops of other libraries, for ``test_attention_adapters`` alone."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


INTERPRETED = (torch.float32, torch.float16)


def part(op: str, name: str) -> ModuleType:
    """Until every family has CASES and Backends: a module of an op that has not."""
    return import_module(path_of(op, name))


def cases(op: str) -> Cases:
    """Return the sizes of ``op``."""
    package = f"emu3_kernels.ops.{OPS[op]}"
    if find_spec(f"{package}.cases"):
        stated = getattr(import_module(f"{package}.cases"), "CASES", None)
        if stated is not None:
            return stated[op]
    stated = vars(part(op, "cases"))
    names = {"make": "make", "check": "CHECK", "time": "TIME", "decode": "DECODE"}
    names |= {"scale": "SCALE", "constants": "CONSTANTS", "written": "WRITTEN"}
    names |= {"cpu_dtypes": "NATIVE_DTYPES", "bytes_moved": "bytes_moved", "flops": "flops"}
    names |= {"backward_bytes": "backward_bytes", "training_bytes": "training_bytes"}
    return Cases(**{field: stated[name] for field, name in names.items() if name in stated})


def backends_of(op: str) -> Mapping:
    """Return the backends of ``op`` by name; of one that is not there, the reason why."""
    if op in dispatch._by_op:
        present = dispatch.backends(op)
        return {name: present[name] for name in present if name != "reference"}
    return part(op, "api").BACKENDS


def reference(op: str) -> Callable:
    """Return the definition of ``op`` in plain PyTorch."""
    if op in dispatch._by_op:
        return dispatch.backends(op)["reference"].function
    return getattr(part(op, "reference"), op)


def public(op: str) -> Callable:
    return getattr(emu3_kernels, op)


def backends(op: str) -> Iterator[str]:
    """Name every backend of our own; the native one once per level: ``cpu@avx2``."""
    for backend in backends_of(op):
        if backend in LIBRARIES:
            continue
        if backend == "cpu" and not library.MISSING:
            yield from (f"cpu@{level}" for level in library.cpu_levels())
        else:
            yield backend


def at_level(backend: str) -> tuple[str, AbstractContextManager]:
    """Split ``cpu@avx2`` into the backend and the context that sets the level."""
    name, _, level = backend.partition("@")
    return name, library.use_cpu_level(level) if level else nullcontext()


def runnable(backend: str, dtype: torch.dtype) -> torch.dtype:
    """Return float16 for bfloat16 where Triton interprets: ttsem tests its bfloat16."""
    interpreted = backend == "triton" and not torch.cuda.is_available()
    return torch.float16 if interpreted and dtype == torch.bfloat16 else dtype


def must_run(op: str, backend: str) -> tuple[torch.dtype, ...]:
    """List the dtypes that a backend may not refuse; ttsem tests Triton in bfloat16."""
    if backend == "cpu":
        return cases(op).cpu_dtypes
    if backend == "triton" and not torch.cuda.is_available():
        return INTERPRETED
    return DTYPES


def calls() -> Iterator[tuple[str, str, dict, torch.dtype]]:
    for op in OPS:
        for backend in backends(op):
            for size in cases(op).check:
                for dtype in DTYPES:
                    yield op, backend, size, dtype


def check_call(
    op: str, backend: str, size: dict, dtype: torch.dtype, device: str = "cpu"
) -> str | None:
    """Hold the value and every gradient of one call to the reference at float64.

    Args:
        op: a public op, a key of ``OPS``.
        backend: its name; ``cpu@avx2`` for one level of the CPU kernels.
        size: keywords of the ``make`` of its cases.
        dtype: of the floating inputs.
        device: where the inputs are made.

    Returns:
        Why the backend refuses the call, or None: the results are within the budget.

    Raises:
        AssertionError: a result is less accurate than the budget allows, or the backend refuses a
            dtype that it must run.
    """
    inputs = cases(op).make(**size, dtype=dtype, device=device)
    name, level = at_level(backend)
    try:
        with level:
            actual = value_and_gradients(op, partial(public(op), backend=name), inputs)
    except NotImplementedError as error:
        refusal = str(error)
        assert dtype not in must_run(op, name), refusal
        assert refusal.startswith(f"{op}: backend '{name}' cannot run this call: "), refusal
        return refusal
    low = value_and_gradients(op, reference(op), inputs)
    exact = value_and_gradients(op, reference(op), double(inputs))
    for result in actual:
        assert_as_accurate(result, actual[result], low[result], exact[result])
    return None


def differentiable(op: str, inputs: dict) -> list[str]:
    """Name the inputs of ``op`` that have a gradient: its floating tensors less its CONSTANTS."""
    constants = cases(op).constants
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in constants
    ]


def double(inputs: dict) -> dict:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def value_and_gradients(op: str, function: Callable, inputs: dict) -> dict[str, Tensor]:
    """Call ``function``, draw a gradient for every floating result, and pull all of them back.

    What an op has WRITTEN into its inputs, copies of them here, is a result too.
    """
    written = {name: inputs[name].clone() for name in cases(op).written}
    inputs = inputs | written
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable(op, inputs)}
    results = function(**{**inputs, **leaves})
    results = results if isinstance(results, tuple) else (results,)
    named = {f"output {i}": result.detach() for i, result in enumerate(results)}
    named |= written
    floating = [result for result in results if result.requires_grad]
    if floating:
        random = torch.Generator().manual_seed(1)
        # Exact in every dtype, so that a budget holds the rounding of the op alone.
        douts = [torch.randn(r.shape, generator=random).bfloat16().to(r) for r in floating]
        grads = torch.autograd.grad(floating, list(leaves.values()), douts)
        named |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return named
