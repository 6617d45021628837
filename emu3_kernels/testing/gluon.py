"""Gluon kernels on a CPU, which Triton does not interpret: call :func:`emulate` once.

A kernel runs as the Python that it is written in, on functions of the same names. Every partition
of warps is a thread, of which one runs at a time; programs end its turn at different places. A tile
is NaN from the moment a copy to it is asked for until its barrier is waited for, and a product
reads its tiles when it is waited for: one freed too early or read too early gives NaN. A matmul of
sm_100 ends after those issued before, as late as its barrier is waited for; until then, to write an
operand or to use the result is an error. Partitions that all wait raise one too.
"""

import threading
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from types import FunctionType, SimpleNamespace

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

from emu3_kernels.runtime import launch
from emu3_kernels.testing.gluon_memory import (
    TORCH_DTYPES,
    Descriptor,
    Matmul,
    Pointer,
    Shared,
    TensorMemory,
    Value,
    argument_of,
    value_of,
)

TURNS = ({"wait", "arrive"}, set(), {"arrive"})
"""What ends a turn beside a wait that is not over: no one choice shows every fault."""


def emulate() -> None:
    """Run launches of Gluon kernels here, on tensors of the CPU."""
    compiled = JITFunction.run

    def run(kernel, *args, grid, warmup, **options):
        if not kernel.is_gluon():
            return compiled(kernel, *args, grid=grid, warmup=warmup, **options)
        constants = {name: x for name, x in options.items() if name in kernel.arg_names}
        for ids, turn_ends in zip(product(*map(range, grid)), cycle(TURNS), strict=False):
            program = _Program(ids, turn_ends)
            program.run(kernel, [argument_of(x) for x in args], constants)
        return None

    JITFunction.run = run
    launch.gluon_devices.add("cpu")


class _Barrier:
    """Completes a phase when all have arrived and all bytes that were expected are there."""

    def __init__(self) -> None:
        self.count = self.missing = self.nbytes = self.phase = 0
        self.running: list[Callable[[], None]] = []

    def completed(self, phase: int) -> bool:
        """Whether the phase of that parity is over; what it waits for ends now."""
        while self.running and self.phase == phase:
            self.running.pop(0)()
        return self.phase != phase

    def change(self, arrivals: int, nbytes: int) -> None:
        self.missing -= arrivals
        self.nbytes += nbytes
        assert self.missing >= 0, "a barrier has more arrivals than it was made for"
        if not self.missing and not self.nbytes:
            self.missing, self.phase = self.count, self.phase ^ 1


class _Product:
    """A product that runs: ``warpgroup_mma_wait`` computes it."""

    def __init__(self, a: object, b: Shared, acc: Value, use_acc: bool) -> None:
        self.operands, self.result = (a, b, acc, use_acc), None

    def finish(self) -> None:
        a, b, acc, use_acc = self.operands
        a = a.data if isinstance(a, Shared) else a.as_subclass(Tensor)
        exact = torch.matmul(a.double(), b.data.double())
        if use_acc:
            exact += acc.as_subclass(Tensor)
        self.result = value_of(exact.float())


class _Partition(threading.Thread):
    """Warps that run until they wait for a barrier; then it is the turn of others."""

    def __init__(self, program: "_Program", call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.program, self.call = program, call
        self.turn, self.is_ready = threading.Semaphore(0), lambda: True
        self.running: list[_Product] = []
        self.finished, self.error = False, None

    @torch.no_grad()  # which is a setting of the thread
    def run(self) -> None:
        self.turn.acquire()
        try:
            self.call()
            assert not self.running, "a product was never waited for"
            self.finished = True
            self.program.pass_turn()
        except BaseException as error:  # for the thread that launches
            self.error = error
            self.program.all_done.release()


class _Program:
    """One program: its partitions, and the functions of Gluon by name."""

    def __init__(self, ids: tuple[int, ...], turn_ends: set[str]) -> None:
        self.ids, self.partitions, self.modules = ids, [], {}
        self.turn_ends = turn_ends
        self.current: _Partition | None = None
        self.all_done = threading.Semaphore(0)
        self.matmuls: list[Matmul] = []
        self.functions = {
            **{name: getattr(gl, name) for name in LANGUAGE},
            **MATHS,
            "program_id": lambda axis: value_of(torch.tensor(ids[axis], dtype=torch.int32)),
            "warp_specialize": self.warp_specialize,
        }
        self.barriers = SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=self.init,
            wait=self.wait,
            arrive=self.arrive,
            expect=lambda barrier, nbytes: barrier.change(1, nbytes),
        )

    def run(self, kernel: JITFunction, args: list, constants: dict) -> None:
        self.translate(kernel)(*args, **constants)

    def translate(self, function: JITFunction) -> FunctionType:
        """Return the Python function with the names of its module bound to those of this class."""
        python = function.fn
        known = self.modules.get(python.__module__)
        if known is None:
            known = self.modules[python.__module__] = dict(python.__globals__)
            known |= {
                "gl": SimpleNamespace(**self.functions),
                "mbarrier": self.barriers,
                "async_load": self.load,
                "warpgroup_mma": self.multiply,
                "warpgroup_mma_wait": self.wait_for_products,
                "allocate_tensor_memory": self.allocate,
                "tcgen05_mma": self.issue,
                "range": lambda *bounds: range(*map(int, bounds)),
            }
            for name, x in python.__globals__.items():
                if isinstance(x, JITFunction):
                    known[name] = self.translate(x)
                elif isinstance(x, gl.constexpr):
                    known[name] = x.value
        return FunctionType(python.__code__, known, python.__name__, python.__defaults__)

    def warp_specialize(self, calls: list[tuple], *_: object) -> None:
        self.partitions = [_Partition(self, partial(f, *args)) for f, args in calls]
        for partition in self.partitions:
            partition.start()
        self.pass_turn()
        self.all_done.acquire()
        for partition in self.partitions:
            if partition.error is not None:
                raise partition.error
        assert not self.matmuls, "a matmul runs on after the program"

    def pass_turn(self) -> None:
        """Let the next partition run that can; end all if none can."""
        last = self.partitions.index(self.current) + 1 if self.current else 0
        order = self.partitions[last:] + self.partitions[:last]
        left = [p for p in order if not p.finished]
        if not left:
            self.all_done.release()
        elif (ready := next((p for p in left if p.is_ready()), None)) is not None:
            self.current = ready
            self.current.turn.release()
        else:
            left[0].error = RuntimeError("all partitions wait for barriers: the kernel would hang")
            self.all_done.release()

    def init(self, barrier: _Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def wait(self, barrier: _Barrier, phase: int) -> None:
        """Wait until the phase of that parity is complete."""
        if "wait" in self.turn_ends or not barrier.completed(int(phase)):
            self.let_others_run(partial(barrier.completed, int(phase)))

    def arrive(self, barrier: _Barrier, count: int) -> None:
        barrier.change(count, 0)
        if "arrive" in self.turn_ends:
            self.let_others_run(lambda: True)

    def let_others_run(self, is_ready: Callable[[], bool]) -> None:
        partition = self.current
        partition.is_ready = is_ready
        self.pass_turn()
        partition.turn.acquire()

    def load(self, source: Descriptor, at: list, barrier: _Barrier, target: Shared) -> None:
        """Copy a block; what lies outside the matrix is 0."""
        inside = (slice(int(i), int(i) + n) for i, n in zip(at, source.block_shape, strict=True))
        block = source.matrix[tuple(inside)]

        def write(value: Tensor | float) -> None:
            running = any(matmul.uses(target) for matmul in self.matmuls)
            assert not running, "shared memory is written while a matmul reads it"
            target.data[:] = value

        def copy() -> None:
            write(0)
            target.data[tuple(map(slice, block.shape))] = block
            barrier.change(0, -source.block_type.nbytes)

        write(torch.nan)
        barrier.running.append(copy)

    def multiply(
        self, a: object, b: Shared, acc: Value, *, use_acc: bool = True, is_async: bool
    ) -> _Product:
        assert is_async
        self.current.running.append(_Product(a, b, acc, use_acc))
        return self.current.running[-1]

    def wait_for_products(self, num_running: int, products: tuple[_Product, ...]) -> Value:
        running = self.current.running
        while len(running) > num_running:
            running.pop(0).finish()
        (result,) = (p.result for p in products)
        assert result is not None, "a product is read while it runs"
        return result

    def allocate(self, dtype: object, shape: list[int], layout: object) -> TensorMemory:
        data = torch.full(shape, torch.nan, dtype=TORCH_DTYPES[dtype.name])
        return TensorMemory(data, dtype, self.matmuls)

    def issue(
        self, a: Shared, b: Shared, acc: TensorMemory, *, use_acc: bool = True, mbarriers: list
    ) -> None:
        matmul = Matmul(a, b, acc, use_acc, mbarriers)
        self.matmuls.append(matmul)
        for barrier in mbarriers:
            barrier.running.append(partial(self.finish, matmul))

    def finish(self, matmul: Matmul) -> None:
        """End ``matmul`` and all that were issued before."""
        while matmul in self.matmuls:
            self.matmuls.pop(0).finish()


def _full(shape: list[int], value: float, dtype: object, layout: object) -> Value:
    return value_of(torch.full(shape, value, dtype=TORCH_DTYPES[dtype.name]))


def _allocate(
    dtype: object, shape: list[int], layout: object, value: Value | None = None
) -> object:
    if value is not None:
        return Shared(value.as_subclass(Tensor), dtype)
    if dtype == gl.int64:
        stages = [_Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: stages[int(i)]) if len(shape) > 1 else stages[0]
    return Shared(torch.full(shape, torch.nan, dtype=TORCH_DTYPES[dtype.name]), dtype)


def _extreme(a: object, b: object, of_tensors: Callable, of_numbers: Callable) -> object:
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return of_numbers(a, b)
    return of_tensors(*map(torch.as_tensor, (a, b)))


LANGUAGE = (
    "float32", "int32", "int64", "uint32", "constexpr",
    "SliceLayout", "BlockedLayout", "NVMMADistributedLayout", "DotOperandLayout",
    "SwizzledSharedLayout",
)  # fmt: skip
MATHS = {
    "static_range": range,
    "arange": lambda start, end, layout: value_of(torch.arange(start, end, dtype=torch.int32)),
    "zeros": lambda shape, dtype, layout: _full(shape, 0, dtype, layout),
    "full": _full,
    "allocate_shared_memory": _allocate,
    "convert_layout": lambda x, layout, assert_trivial=False: x,
    "minimum": partial(_extreme, of_tensors=torch.minimum, of_numbers=min),
    "maximum": partial(_extreme, of_tensors=torch.maximum, of_numbers=max),
    "max": lambda x, axis: x.amax(axis),
    "sum": lambda x, axis: x.sum(axis),
    "exp2": torch.exp2,
    "log2": torch.log2,
    "where": torch.where,
    "load": Pointer.load,
    "store": lambda pointer, value, mask: pointer.store(value, mask),
}
"""Functions of the language that are the same in every program."""
