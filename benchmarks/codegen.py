"""The code-generation gate: what the compiler makes of every Triton kernel, without a GPU.

Every entry of every op's CONFIGS is launched on tensors without memory; each launch is compiled
for each target, its machine code is counted and held to the contract that stands beside the
kernel. The numbers are COUNTED: nothing here is timed.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.harness import machine
from benchmarks.machine_code import Facts, amd_facts, nvidia_facts
from emu3_kernels.ops import OPS
from emu3_kernels.runtime import launch as launching
from emu3_kernels.runtime.launch import INTERPRETED, Config, Contract

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one block may ask for: one entry a target."""

_counted: dict[tuple[str, str, str], Facts] = {}


@dataclass(frozen=True)
class Launch:
    """What a Triton launcher was given, in place of a launch."""

    kernel: JITFunction
    args: tuple
    options: dict

    def num_bytes(self) -> int:
        given = [*self.args, *self.options.values()]
        return sum({id(t): t.nbytes for t in given if isinstance(t, torch.Tensor)}.values())


@dataclass(frozen=True)
class Row:
    """One launch compiled for one target, and how its contract fares."""

    op: str
    kernel: str
    config: str
    target: str
    facts: Facts
    num_bytes: int
    """Size of all tensors that the launch is given, each once."""
    broken: tuple[str, ...]
    """A line for each term that is not kept, and for each exception that is not needed."""
    excused: tuple[str, ...]
    """A line for each term that is not kept for a reason, which stands in the contract."""
    held: bool = True
    """False for the kernels of others, which have no contract."""


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
    name = f"emu3_kernels.ops.{op}.triton"
    configs = import_module(name).CONFIGS if find_spec(name) else ()
    return [list(rows_of(op, config, target)) for config in configs]


def rows_of(op: str, config: Config, target: str) -> Iterator[Row]:
    """Compile what ``config`` launches for ``target`` and hold it to its contracts."""
    with mock.patch.object(launching, "WARP", gpu_of(target).warp_size):
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
    """Keep every Triton launch inside the block instead of making it."""
    launches: list[Launch] = []

    def run(kernel, *args, grid, warmup, **options):
        launches.append(Launch(kernel, args, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def gpu_of(target: str) -> GPUTarget:
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target[3:]), 32)


def facts_of(launch: Launch, target: str) -> Facts:
    """Compile ``launch``, specialised as Triton's launcher would, and count; the like of it once.

    Triton's cache is passed by: what is counted is what this source and this compiler make.
    """
    gpu = gpu_of(target)
    amd = gpu.backend == "hip"
    backend = make_backend(gpu)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound = bind(*launch.args, **launch.options)
    options, *specialised = kernel._pack_args(backend, launch.options, *bound)
    source = ASTSource(kernel, *specialised)
    key = (source.hash(), options.hash(), target)
    if key not in _counted:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile = True
            compiled = triton.compile(source, target=gpu, options=vars(options))
        code = compiled.asm["amdgcn" if amd else "cubin"]
        _counted[key] = (amd_facts if amd else nvidia_facts)(code, compiled.metadata.shared)
    return _counted[key]


def judge(contract: Contract, facts: Facts, target: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what ``facts`` break of ``contract``: without an excuse, and with one."""
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
                f"got {_listed(accesses)}",
            )
    if contract.tensor_cores and not facts.matrix_ops:
        yield "tensor_cores", "must be used, got no matrix opcode"
    if contract.async_copies and not facts.async_copies:
        yield "async_copies", "must be used, got none"


def _listed(counts: dict) -> str:
    """Write counts as ``2x16 1x4``: two of 16 bytes, one of 4."""
    return " ".join(f"{n}x{what}" for what, n in sorted(counts.items(), reverse=True)) or "-"


def table(rows: Iterable[Row]) -> Table:
    out = Table(title="COUNTED in the machine code; accesses are count x bytes a thread")
    for column in ("op", "kernel", "config", "target"):
        out.add_column(column, no_wrap=True)
    for column in ("registers", "stack", "spills", "shared", "loads", "stores", "matrix", "async"):
        out.add_column(column, justify="right", no_wrap=True)
    out.add_column("contract")
    for row in rows:
        facts = row.facts
        numbers = (facts.registers, facts.stack, facts.spills, facts.shared)
        counts = (facts.loads, facts.stores, facts.matrix_ops)
        out.add_row(
            *(row.op, row.kernel, row.config, row.target),
            *(str(n) for n in numbers),
            *(_listed(c) for c in counts),
            str(facts.async_copies),
            _verdict(row),
        )
    return out


def _verdict(row: Row) -> str:
    if not row.held:
        return "none"
    excuses = [f"[yellow]excused {line}" for line in row.excused]
    return "\n".join([*(f"[red]{line}" for line in row.broken), *excuses]) or "[green]kept"


def codegen(
    op: Annotated[list[str] | None, typer.Option(help="Op to compile; all by default.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    peers: Annotated[bool, typer.Option(help="Count Liger-Kernel's kernels beside ours.")] = False,
) -> None:
    """Compile every Triton kernel for every target and hold it to its contract; no GPU needed."""
    ops = op or list(OPS)
    if unknown := sorted(set(ops) - set(OPS)):
        raise typer.BadParameter(f"--op must be of {', '.join(OPS)}, got {', '.join(unknown)}")
    rows = rows_beside(ops, peers)
    # Columns that are cut short say nothing: a narrow terminal wraps whole lines instead.
    Console(width=max(Console().width, 210)).print(table(rows))
    if json_path:
        write(json_path, rows)
    if any(row.broken for row in rows):
        raise typer.Exit(1)


def rows_beside(ops: Iterable[str], peers: bool) -> list[Row]:
    """Count as ``count`` does, in a process for each core, then Liger-Kernel's if ``peers``.

    A process compiles what one op launches for one target at a time.
    """
    counters = [rows_of_op]
    if peers:
        counters.append(import_module("benchmarks.codegen_peers").rows_of_op)
    with ProcessPoolExecutor(machine.cores(), get_context("spawn")) as pool:
        asked = [
            [pool.submit(counter, op, target) for target in SHARED_LIMIT]
            for counter, op in product(counters, ops)
        ]
        return [row for futures in asked for row in by_config(f.result() for f in futures)]


def write(path: Path, rows: list[Row]) -> None:
    """Write ``rows`` as ``report`` reads them."""
    stated = {"label": "COUNTED", "triton": triton.__version__}
    path.write_text(json.dumps(stated | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
