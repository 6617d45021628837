"""The generic suite: values and every gradient of an op against its reference at float64.

The tests call it, and whoever adds a backend: ``check_backend("swiglu", "mine")``.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

import emu3_kernels
from emu3_kernels.ops import OPS
from emu3_kernels.runtime import dispatch, library
from emu3_kernels.runtime.cases import Cases
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.cache import cached

LIBRARIES = ("cudnn", "flash_attn", "torch_flash", "xformers", "sdpa", "aten")
"""Backends that call the ops of other libraries: ``test_attention_adapters`` checks them."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = (torch.float32, torch.float16)
KEPT_BYTES = 4 << 20
"""Results of the reference for larger inputs are computed each time: reading them is as slow."""


def cases(op: str) -> Cases:
    """Return the sizes of ``op``."""
    return import_module(f"emu3_kernels.ops.{OPS[op]}.cases").CASES[op]


def backends_of(op: str) -> Mapping:
    """Return the backends of ``op`` by name; of one that is not there, the reason why."""
    return {name: backend for name, backend in dispatch.backends(op).items() if name != "reference"}


def reference(op: str) -> Callable:
    """Return the definition of ``op`` in plain PyTorch."""
    return dispatch.backends(op)["reference"].function


def public(op: str) -> Callable:
    return getattr(emu3_kernels, op)


def backends(op: str) -> Iterator[str]:
    """Name our own backends that are installed; ``cpu`` once per level: ``cpu@avx2``."""
    for name, backend in backends_of(op).items():
        if name in LIBRARIES or isinstance(backend, str) or device_of(name) is None:
            continue
        if name == "cpu" and not library.MISSING:
            yield from (f"cpu@{level}" for level in library.cpu_levels())
        else:
            yield name


def device_of(backend: str) -> str | None:
    """Return the type of the device that ``backend`` is checked on here; None if there is none."""
    name = backend.partition("@")[0]
    gpu = torch.cuda.is_available()
    if name == "cpu":
        return "cpu"
    if name == "cuda":
        return "cuda" if gpu else None
    return "cuda" if gpu else "cpu"


def at_level(backend: str) -> tuple[str, AbstractContextManager]:
    """Split ``cpu@avx2`` into the backend and the context that sets the level."""
    name, _, level = backend.partition("@")
    return name, library.use_cpu_level(level) if level else nullcontext()


def is_lower_level(backend: str) -> bool:
    """Whether ``backend`` is a CPU level below the highest of this processor."""
    name, _, level = backend.partition("@")
    return name == "cpu" and level in library.cpu_levels()[:-1]


def runnable(backend: str, dtype: torch.dtype) -> torch.dtype:
    """Return float16 for bfloat16 where Triton interprets: ttsem tests its bfloat16."""
    interpreted = backend == "triton" and not torch.cuda.is_available()
    return torch.float16 if interpreted and dtype == torch.bfloat16 else dtype


def must_run(op: str, backend: str) -> tuple[torch.dtype, ...]:
    """List the dtypes that a backend may not refuse; ttsem tests Triton in bfloat16."""
    if backend == "reference":
        return DTYPES
    if backend == "cpu" and not library.MISSING:
        return tuple(cases(op).cpu_dtypes)
    if backend == "triton":
        return DTYPES if torch.cuda.is_available() else INTERPRETED
    return ()


def may_refuse(op: str, backend: str) -> tuple[torch.dtype, ...]:
    return tuple(dtype for dtype in DTYPES if dtype not in must_run(op, backend))


def calls() -> Iterator[tuple[str, str, dict, torch.dtype]]:
    """Yield every call that must run."""
    for op in OPS:
        for backend in backends(op):
            for size in cases(op).check:
                for dtype in must_run(op, at_level(backend)[0]):
                    yield op, backend, size, dtype


def check_call(
    op: str, backend: str, size: dict, dtype: torch.dtype, device: str | None = None
) -> str | None:
    """Compare the value and every gradient of one call with the reference at float64.

    Args:
        op: a public op, a key of ``OPS``.
        backend: its name; ``cpu@avx2`` for one level of the CPU kernels.
        size: keywords of the ``make`` of its cases.
        dtype: of the floating inputs.
        device: where the inputs are made; by default a GPU if there is one and ``backend`` uses it.

    Returns:
        Why the backend refuses the call, or None: the results are within the budget.

    Raises:
        AssertionError: a result is less accurate than the budget allows, or the backend refuses a
            dtype that it must run.
    """
    device = device or device_of(backend) or "cpu"
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
    low, exact = truth(op, size, dtype, device)
    for result in actual:
        assert_as_accurate(result, actual[result], low[result], exact[result])
    return None


@dataclass(frozen=True)
class Outcome:
    """Of one call: within the budget unless there is a refusal or a failure."""

    size: dict
    dtype: torch.dtype
    refusal: str | None = None
    failure: str | None = None


def outcomes(op: str, backend: str) -> Iterator[Outcome]:
    """Check ``backend`` on every size and dtype of ``op``."""
    for size in cases(op).check:
        for dtype in DTYPES:
            try:
                yield Outcome(size, dtype, refusal=check_call(op, backend, size, dtype))
            except Exception as error:  # whatever a new backend raises is its failure
                yield Outcome(size, dtype, failure=f"{type(error).__name__}: {error}")


def check_backend(op: str, backend: str) -> list[Outcome]:
    """Return the outcome of every size and dtype of ``op``.

    Raises:
        AssertionError: a call fails, or the backend refuses every call.
    """
    listed = list(outcomes(op, backend))
    failures = [f"{o.size} {o.dtype}: {o.failure}" for o in listed if o.failure]
    assert not failures, "\n".join([f"{op}: backend {backend!r} fails", *failures])
    assert any(o.refusal is None for o in listed), f"{op}: backend {backend!r} refuses every call"
    return listed


def truth(
    op: str, size: dict, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the value and the gradients of the reference, at ``dtype`` and at float64.

    All backends share them; small ones are kept on disk until the reference, its cases or torch
    change.
    """
    inputs = cases(op).make(**size, dtype=dtype, device=device)

    def computed() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        low = value_and_gradients(op, reference(op), inputs)
        return low, value_and_gradients(op, reference(op), double(inputs))

    def saved() -> bytes:
        file = io.BytesIO()
        torch.save(computed(), file)
        return file.getvalue()

    if sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor)) > KEPT_BYTES:
        return computed()
    key = ("truth", op, repr(sorted(size.items())), str(dtype), _machine(device), _sources(op))
    stored = cached("\n".join(key), saved)
    return torch.load(io.BytesIO(stored), map_location=device, weights_only=True)


def _machine(device: str) -> str:
    """Name what the rounding of PyTorch's own kernels depends on."""
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return f"{torch.__version__} {name} {torch.get_num_threads()}"


@cache
def _sources(op: str) -> str:
    """Hash every source that a reference can depend on: all of a family but its kernels."""
    family = Path(import_module(f"emu3_kernels.ops.{OPS[op]}").__path__[0])
    kernels = ("triton", "cpu", "cuda", "contracts")
    paths = [
        path
        for path in sorted(family.glob("*.py"))
        if not any(path.stem.startswith(name) or path.stem.endswith(f"_{name}") for name in kernels)
    ]
    paths += [*sorted(Path(dispatch.__file__).parent.glob("*.py")), Path(__file__)]
    return sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def differentiable(op: str, inputs: dict) -> list[str]:
    """Name the inputs of ``op`` that have a gradient: floating tensors that are not constants."""
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
    """Call ``function`` and its backward with a random gradient for every floating result.

    Inputs that the op writes to, copies of them here, are results too.
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
