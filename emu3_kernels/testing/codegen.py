"""The code-generation gate: what the compiler makes of every Triton kernel, without a GPU.

Every entry of every family's ``CONFIGS`` is called on tensors without memory. Each launch is
compiled for each target; its machine code is counted and compared with the contract beside it. The
numbers are COUNTED: nothing here is timed. What was counted once is kept on disk.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from emu3_kernels.ops import OPS
from emu3_kernels.runtime.contracts import Config, Contract
from emu3_kernels.runtime.launch import INTERPRETED, Gpu, assume_gpu
from emu3_kernels.testing import machine_code
from emu3_kernels.testing.cache import cached
from emu3_kernels.testing.machine_code import Facts, amd_facts, nvidia_facts

GPUS = {
    "sm_80": Gpu(warp_size=32, num_sms=108, capability=80),  # A100
    "sm_90": Gpu(warp_size=32, num_sms=132, capability=90),  # H100
    "sm_100": Gpu(warp_size=32, num_sms=148, capability=100),  # B200
    "gfx942": Gpu(warp_size=64, num_sms=304),  # MI300X
}
"""The GPU that host code chooses tiles and grids for, by target."""

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one block may use, by target."""


@dataclass(frozen=True)
class Launch:
    """The arguments of one launch of a Triton kernel, recorded in place of the launch."""

    kernel: JITFunction
    args: tuple
    options: dict

    def num_bytes(self) -> int:
        given = [*self.args, *self.options.values()]
        return sum({id(t): t.nbytes for t in given if isinstance(t, torch.Tensor)}.values())


@dataclass(frozen=True)
class Row:
    """One launch compiled for one target, and which terms of its contract it keeps."""

    op: str
    kernel: str
    config: str
    target: str
    facts: Facts
    num_bytes: int
    """Size of all tensor arguments of the launch, each counted once."""
    broken: tuple[str, ...]
    """A line for each term that is broken, and for each exception that is not needed."""
    excused: tuple[str, ...]
    """A line for each term that is broken for a reason given in the contract."""
    held: bool = True
    """False for kernels of peers, which have no contract."""


def count(ops: Iterable[str] = OPS, targets: Iterable[str] = SHARED_LIMIT) -> Iterator[Row]:
    """Yield a row for every op, config, target and kernel."""
    for op in ops:
        yield from by_config([rows_of_op(op, target) for target in targets])


def by_config(of_targets: Iterable[list[list[Row]]]) -> Iterator[Row]:
    """Put the targets of a config together: each of ``of_targets`` has a list for each config."""
    for of_config in zip(*of_targets, strict=True):
        yield from chain.from_iterable(of_config)


def rows_of_op(op: str, target: str) -> list[list[Row]]:
    """Return the rows of each config of ``op``; an op without Triton has none."""
    return [list(rows_of(op, config, target)) for config in configs_of(op)]


def configs_of(op: str) -> Sequence[Config]:
    """Return what the ``contracts.py`` of the family has for ``op``: ``CONFIGS[op]``."""
    contracts = f"emu3_kernels.ops.{OPS[op]}.contracts"
    return import_module(contracts).CONFIGS.get(op, ()) if find_spec(contracts) else ()


def rows_of(op: str, config: Config, target: str) -> Iterator[Row]:
    """Compile what ``config`` launches for ``target`` and compare it with its contracts."""
    with assume_gpu(GPUS[target]):
        launches = launches_of(config)
    for launch in launches:
        kernel = launch.kernel.__name__
        facts = facts_of(launch, target)
        broken, excused = judge(config.contracts[kernel], facts, target)
        moved = launch.num_bytes()
        yield Row(op, kernel, config.name, target, facts, moved, broken, excused)


def launches_of(config: Config) -> list[Launch]:
    if INTERPRETED:
        raise RuntimeError("codegen: kernels must be compiled, got TRITON_INTERPRET=1")
    with recorded() as launches:
        config.call()
    if any("enable_fp_fusion" not in launch.options for launch in launches):
        raise ValueError(f"codegen: {config.name} must set enable_fp_fusion, got Triton's default")
    launched = {launch.kernel.__name__ for launch in launches}
    if launched != set(config.contracts):
        raise ValueError(
            f"codegen: {config.name} must have a contract for each of {sorted(launched)}, "
            f"got {sorted(config.contracts)}"
        )
    return launches


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record every Triton launch inside the block; none is made."""
    launches: list[Launch] = []

    def run(kernel, *args, grid, warmup, **options):
        launches.append(Launch(kernel, args, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def compiler_target(target: str) -> GPUTarget:
    if target.startswith("gfx"):
        return GPUTarget("hip", target, GPUS[target].warp_size)
    return GPUTarget("cuda", int(target[3:]), GPUS[target].warp_size)


def facts_of(launch: Launch, target: str) -> Facts:
    """Compile ``launch``, specialised as Triton's launcher would, and count in its machine code.

    The key of the cache is the source with all that it calls, the specialisation, the options, the
    target, Triton's version and how the facts are counted.
    """
    compiler = compiler_target(target)
    backend = make_backend(compiler)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound = bind(*launch.args, **launch.options)
    options, *specialised = kernel._pack_args(backend, launch.options, *bound)
    source = ASTSource(kernel, *specialised)

    def compiled() -> bytes:
        # Triton's own cache is not used: the facts are those of this compiler.
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile = True
            binary = triton.compile(source, target=compiler, options=vars(options))
        if compiler.backend == "hip":
            facts = amd_facts(binary.asm["amdgcn"], binary.metadata.shared)
        else:
            facts = nvidia_facts(binary.asm["cubin"], binary.metadata.shared)
        return json.dumps(asdict(facts)).encode()

    key = ("machine code", source.hash(), options.hash(), target, *_counter())
    return _facts(cached("\n".join(key), compiled))


@cache
def _counter() -> tuple[str, str]:
    source = Path(machine_code.__file__).read_bytes()
    return triton.__version__, sha256(source).hexdigest()


def _facts(stored: bytes) -> Facts:
    """Read facts from JSON, which has made the bytes of an access text."""
    facts = json.loads(stored)
    accesses = {
        way: {int(width): n for width, n in facts[way].items()} for way in ("loads", "stores")
    }
    return Facts(**facts | accesses)


def judge(contract: Contract, facts: Facts, target: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the terms of ``contract`` that ``facts`` break: without an exception, and with one."""
    broken = dict(_broken_terms(contract, facts, SHARED_LIMIT[target]))
    reasons = {
        key.removeprefix(f"{target}: "): reason
        for key, reason in contract.exceptions.items()
        if key.startswith(f"{target}: ")
    }
    refused = {term: what for term, what in broken.items() if term not in reasons}
    excused = {term: reason for term, reason in reasons.items() if term in broken}
    for term in reasons.keys() - broken.keys():
        refused[term] = f"kept, so the exception on {target} must go"
    return _lines(refused), _lines(excused)


def _lines(terms: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{term}: {what}" for term, what in terms.items())


def _broken_terms(contract: Contract, facts: Facts, shared: int) -> Iterator[tuple[str, str]]:
    if facts.stack or facts.spills:
        yield "spills", f"must be none, got {facts.spills} and {facts.stack} bytes of stack"
    if facts.shared > shared:
        yield "shared", f"must be at most {shared} bytes, got {facts.shared}"
    if facts.registers > contract.max_registers:
        yield "registers", f"must be at most {contract.max_registers}, got {facts.registers}"
    scalars = {"loads": contract.scalar_loads, "stores": contract.scalar_stores}
    for way, allowed in scalars.items():
        accesses = getattr(facts, way)
        narrow = sum(n for width, n in accesses.items() if width < contract.access_bytes)
        if narrow > allowed:
            yield (
                way,
                f"must be {contract.access_bytes} bytes wide but for {allowed}, "
                f"got {listed(accesses)}",
            )
    if contract.tensor_cores and not facts.matrix_ops:
        yield "tensor_cores", "must be used, got no matrix opcode"
    if contract.async_copies and not facts.async_copies:
        yield "async_copies", "must be used, got none"


def listed(counts: dict) -> str:
    """Write counts as ``2x16 1x4``: two of 16 bytes, one of 4."""
    return " ".join(f"{n}x{what}" for what, n in sorted(counts.items(), reverse=True)) or "-"
