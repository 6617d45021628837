"""The code-generation gate: what the compiler makes of every Triton kernel, without a GPU.

Every entry of every family's ``CONFIGS`` is called on tensors without memory. Each launch is
compiled for each target; its machine code is counted and compared with the contract beside it. The
numbers are COUNTED: nothing here is timed. What was counted once is kept on disk.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from math import prod
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from emu3_kernels.ops import OPS
from emu3_kernels.runtime.contracts import Config
from emu3_kernels.runtime.launch import INTERPRETED, assume_gpu
from emu3_kernels.testing import loops, machine_code
from emu3_kernels.testing.cache import cached_all
from emu3_kernels.testing.chips import CHIPS
from emu3_kernels.testing.loops import Block
from emu3_kernels.testing.machine_code import Facts, amd_facts, nvidia_facts
from emu3_kernels.testing.terms import Compiled, judge


@dataclass(frozen=True)
class Launch:
    """The arguments of one launch of a Triton kernel, recorded in place of the launch."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple
    options: dict

    def num_bytes(self) -> int:
        given = [getattr(x, "base", x) for x in (*self.args, *self.options.values())]
        return sum({id(t): t.nbytes for t in given if isinstance(t, torch.Tensor)}.values())

    def sizes(self) -> dict[str, int]:
        given = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.options
        elements = {k: v.numel() for k, v in given.items() if isinstance(v, torch.Tensor)}
        return elements | {k: v for k, v in given.items() if type(v) is int}


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
    sizes: dict[str, int]
    """Elements of the tensors and values of the integers of the launch, by parameter."""
    programs: int
    num_warps: int
    resident: int
    """How many programs one SM holds at once, by registers, shared memory and threads."""
    broken: tuple[str, ...]
    """A line for each term that is broken, and for each exception that is not needed."""
    excused: tuple[str, ...]
    """A line for each term that is broken for a reason given in the contract."""
    held: bool = True
    """False for kernels of peers, which have no contract."""


def count(ops: Iterable[str] = OPS, targets: Iterable[str] = CHIPS) -> Iterator[Row]:
    """Yield a row for every op, config, target and kernel."""
    for op in ops:
        yield from by_config([rows_of_op(op, target) for target in targets])


def by_config(of_targets: Iterable[list[list[Row]]]) -> Iterator[Row]:
    """Put the targets of a config together: each of ``of_targets`` has a list for each config."""
    for of_config in zip(*of_targets, strict=True):
        yield from chain.from_iterable(of_config)


def rows_of_op(op: str, target: str) -> list[list[Row]]:
    """Return the rows of each config of ``op``: none of one that is not for ``target``."""
    return rows_of(op, configs_of(op), target)


def configs_of(op: str) -> Sequence[Config]:
    """Return what the ``contracts.py`` of the family has for ``op``: ``CONFIGS[op]``."""
    contracts = f"emu3_kernels.ops.{OPS[op]}.contracts"
    return import_module(contracts).CONFIGS.get(op, ()) if find_spec(contracts) else ()


def rows_of(op: str, configs: Sequence[Config], target: str) -> list[list[Row]]:
    """Compile what each of ``configs`` launches for ``target``; compare it with its contracts."""
    with assume_gpu(CHIPS[target].gpu):
        launches = [launches_of(config) if config.is_for(target) else [] for config in configs]
    facts = iter(facts_of(list(chain.from_iterable(launches)), target))
    return [
        [row_of(op, config, launch, next(facts), target) for launch in of_config]
        for config, of_config in zip(configs, launches, strict=True)
    ]


def row_of(op: str, config: Config, launch: Launch, facts: Facts, target: str) -> Row:
    """Judge one launch; the kernels of peers have no contract and break none."""
    kernel, programs = launch.kernel.__name__, prod(launch.grid)
    num_warps = facts.num_warps or launch.options.get("num_warps", 4)
    contract = config.contracts.get(kernel)
    broken, excused = (), ()
    if contract is not None:
        version = ".".join(triton.__version__.split(".")[:2])
        broken, excused = judge(contract, Compiled(facts, target, programs, version))
    return Row(
        op=op,
        kernel=kernel,
        config=config.name,
        target=target,
        facts=facts,
        num_bytes=launch.num_bytes(),
        sizes=launch.sizes(),
        programs=programs,
        num_warps=num_warps,
        resident=CHIPS[target].resident(facts, num_warps),
        broken=broken,
        excused=excused,
        held=contract is not None,
    )


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
        grid = grid(options) if callable(grid) else grid
        launches.append(Launch(kernel, tuple(grid), args, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def compiler_target(target: str) -> GPUTarget:
    if target.startswith("gfx"):
        return GPUTarget("hip", target, CHIPS[target].gpu.warp_size)
    return GPUTarget("cuda", int(target[3:]), CHIPS[target].gpu.warp_size)


def facts_of(launches: Sequence[Launch], target: str) -> list[Facts]:
    """Compile ``launches``, specialised as by Triton's launcher, and count in their machine code.

    The key of the cache is the source with all that it calls, the specialisation, the options, the
    target, Triton's version and how the facts are counted.
    """
    compiler = compiler_target(target)
    specialised = [_specialised(launch, compiler) for launch in launches]
    keys = [
        "\n".join(("machine code", source.hash(), options.hash(), target, *_counter()))
        for source, options in specialised
    ]

    def count(wanted: list[int]) -> list[bytes]:
        binaries = [_compiled(*specialised[i], compiler) for i in wanted]
        if compiler.backend == "hip":
            facts = [amd_facts(b.asm["amdgcn"], b.metadata.shared) for b in binaries]
        else:
            facts = nvidia_facts([(b.asm["cubin"], b.metadata.shared) for b in binaries], target)
        facts = [
            replace(found, num_warps=b.metadata.num_warps if launches[i].kernel.is_gluon() else 0)
            for found, b, i in zip(facts, binaries, wanted, strict=True)
        ]
        return [json.dumps(asdict(of_one)).encode() for of_one in facts]

    return [_facts(stored) for stored in cached_all(keys, count)]


def _specialised(launch: Launch, compiler: GPUTarget) -> tuple[ASTSource, object]:
    """Return what Triton compiles for ``launch``, and the options of its compiler."""
    backend, kernel = make_backend(compiler), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound = bind(*launch.args, **launch.options)
    options, *specialised = kernel._pack_args(backend, launch.options, *bound)
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return source(kernel, *specialised), options


def _compiled(source: ASTSource, options: object, compiler: GPUTarget) -> object:
    # Triton's own cache is not used: the facts are those of this compiler. Numbers of source lines
    # change no instruction, and take a tenth of its time.
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        triton.knobs.compilation.disable_line_info = True
        return triton.compile(source, target=compiler, options=vars(options))


@cache
def _counter() -> tuple[str, str]:
    sources = (Path(module.__file__).read_bytes() for module in (machine_code, loops))
    return triton.__version__, sha256(b"".join(sources)).hexdigest()


def _facts(stored: bytes) -> Facts:
    """Read facts from JSON, which has made the bytes of an access text."""
    facts = json.loads(stored)
    accesses = {
        way: {int(width): n for width, n in facts[way].items()} for way in ("loads", "stores")
    }
    found = tuple(Block(**block) for block in facts["blocks"])
    return Facts(**facts | accesses | {"blocks": found})
