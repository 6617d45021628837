"""Counters on a GPU by which the programs of a launch learn which of them is the last."""

import torch
from torch import Tensor

NUM_CAPTURED = 1 << 16
"""Counters of a device for launches that are captured, 512 for a graph of 32 layers of Emu3-8B."""

_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[torch.device, Tensor] = {}
"""Those that no captured launch has yet."""


def counters(tensor: Tensor, count: int) -> Tensor:
    """Return at least ``count`` int32 zeros on the device of ``tensor``, without a launch.

    The launch must leave them zero. Launches on one stream run one after the other and share
    counters. One that is captured in a CUDA graph gets its own, since its graph may be replayed
    beside any other work; it needs an earlier call on that device outside a graph, and without it,
    or after ``NUM_CAPTURED``, they are zeroed by a launch inside the graph. So are those of a
    traced call.
    """
    if torch.compiler.is_compiling():
        return _zeros(tensor, count)
    device, stream = tensor.device, 0
    if tensor.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return _take_captured(tensor, count)
        stream = torch._C._cuda_getCurrentRawStream(tensor.get_device())
    held = _of_stream.get((device, stream))
    if held is None or held.shape[0] < count:
        _captured.setdefault(device, _zeros(tensor, NUM_CAPTURED))
        held = _of_stream[device, stream] = _zeros(tensor, max(count, 1024))
    return held


def _take_captured(tensor: Tensor, count: int) -> Tensor:
    left = _captured.get(tensor.device)
    if left is None or left.shape[0] < count:
        return _zeros(tensor, count)
    _captured[tensor.device] = left[count:]
    return left[:count]


def _zeros(tensor: Tensor, count: int) -> Tensor:
    return tensor.new_zeros(count, dtype=torch.int32)
