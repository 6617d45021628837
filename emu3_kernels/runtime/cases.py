"""The sizes of an op: what the tests check and the benchmarks time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cases:
    """Of one op. A size is a dict of keywords of ``make``, ``bytes_moved`` and ``flops``."""

    make: Callable[..., dict]
    """``make(**size, dtype=, device=)``: the arguments of the op by name, the same each time."""
    check: Sequence[dict]
    """Sizes to test, each argued; the last is the largest."""
    time: Sequence[dict] = ()
    """Sizes to time, forward and backward."""
    decode: Sequence[dict] = ()
    """Sizes to time that have no backward pass."""
    scale: Sequence[dict] = ()
    """Sizes that show how the op grows."""
    bytes_moved: Callable[..., int] | None = None
    """Of a forward pass: traffic that no implementation can avoid."""
    backward_bytes: Callable[..., int] | None = None
    training_bytes: Callable[..., int] | None = None
    """Of forward and backward together, where they are timed as one."""
    flops: Callable[..., int] | None = None
    """Of a forward pass."""
    constants: Sequence[str] = ()
    """Floating inputs without a gradient."""
    written: Sequence[str] = ()
    """Inputs that the op writes to."""
    cpu_dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    """What the ``cpu`` backend may not refuse."""
