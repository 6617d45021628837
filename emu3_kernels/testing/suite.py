"""What the generic suites share: which calls to make, and one call with all its gradients."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

import emu3_kernels
from emu3_kernels.ops import OPS
from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import path_of

LIBRARIES = ("flash_attn", "xformers", "sdpa", "aten")
"""Backends that are the ops of other libraries, for ``test_attention_adapters`` alone."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


INTERPRETED = (torch.float32, torch.float16)


def part(op: str, name: str) -> ModuleType:
    return import_module(path_of(op, name))


def public(op: str) -> Callable:
    return getattr(emu3_kernels, op)


def backends(op: str) -> Iterator[str]:
    """Name every backend of our own; the native one once per level: ``native@avx2``."""
    for backend in part(op, "api").BACKENDS:
        if backend in LIBRARIES:
            continue
        if backend == "native" and not library.MISSING:
            yield from (f"native@{level}" for level in library.cpu_levels())
        else:
            yield backend


def at_level(backend: str) -> tuple[str, AbstractContextManager]:
    """Split ``native@avx2`` into the backend and the context that sets the level."""
    name, _, level = backend.partition("@")
    return name, library.use_cpu_level(level) if level else nullcontext()


def runnable(backend: str, dtype: torch.dtype) -> torch.dtype:
    """Return float16 for bfloat16 where Triton interprets: ttsem tests its bfloat16."""
    interpreted = backend == "triton" and not torch.cuda.is_available()
    return torch.float16 if interpreted and dtype == torch.bfloat16 else dtype


def must_run(op: str, backend: str) -> tuple[torch.dtype, ...]:
    """List the dtypes that a backend may not refuse; ttsem tests Triton in bfloat16."""
    if backend == "native":
        return getattr(part(op, "cases"), "NATIVE_DTYPES", library.DTYPES)
    if backend == "triton" and not torch.cuda.is_available():
        return INTERPRETED
    return DTYPES


def calls() -> Iterator[tuple[str, str, dict, torch.dtype]]:
    for op in OPS:
        for backend in backends(op):
            for size in part(op, "cases").CHECK:
                for dtype in DTYPES:
                    yield op, backend, size, dtype


def differentiable(op: str, inputs: dict) -> list[str]:
    """Name the inputs of ``op`` that have a gradient: its floating tensors less its CONSTANTS."""
    constants = getattr(part(op, "cases"), "CONSTANTS", ())
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
    written = {name: inputs[name].clone() for name in getattr(part(op, "cases"), "WRITTEN", ())}
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
