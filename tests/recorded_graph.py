"""What a CUDA graph does, on a CPU: ops are recorded once and run again on the same tensors."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emu3 import cuda_graph

HOST_READS = {"_local_scalar_dense", "is_nonzero", "item", "equal"}
HOST_READS |= {"lift_fresh", "lift_fresh_copy"}  # a tensor of Python numbers, copied to the GPU
DATA_DEPENDENT = {"nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave"}


class Refused(RuntimeError):
    """A capture would fail here on a GPU."""


class RecordedOps(TorchDispatchMode):
    """Records every op; refuses those for which the host waits or whose shapes depend on data.

    A replay runs the same ops with the same Python numbers and writes each result where the
    recorded one lies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        moves = name == "_to_copy" and kwargs.get("device") is not None
        if name in HOST_READS | DATA_DEPENDENT or _by_mask(name, args) or moves:
            raise Refused(f"{name} in a captured step")
        result = func(*args, **kwargs)
        if not func.is_view:
            self.ops.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self.ops:
            result = func(*args, **kwargs)
            if any(returned.alias_info is None for returned in func._schema.returns):
                for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)


def _by_mask(name: str, args: tuple) -> bool:
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(t is not None and t.dtype == torch.bool for t in tree_leaves(args[1]))


class Counts:
    captures = replays = 0


@contextmanager
def recorded_graphs(monkeypatch):
    """Let :class:`CapturedStep` capture and replay by :class:`RecordedOps` inside the block."""
    counts = Counts()

    def capture(step: Callable, stream: object) -> tuple:
        with RecordedOps() as recorded:
            result = step()
        # A capture computes nothing, and what the recording did is what its first replay does.
        counts.captures += 1
        state = {"first": True}

        def replay() -> None:
            counts.replays += 1
            if not state.pop("first", False):
                recorded.replay()

        return replay, result

    with monkeypatch.context() as patched:
        patched.setattr(cuda_graph, "_capture", capture)
        patched.setattr(cuda_graph, "_run_on", lambda stream, step, *inputs: step(*inputs))
        patched.setattr(torch.cuda, "Stream", lambda device: object())
        yield counts
