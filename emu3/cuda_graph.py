"""A step on a GPU in one launch: captured in a CUDA graph, then replayed.

A step can be captured if it reads nothing from the GPU, allocates by shapes alone, and what it
changes are tensors that stay: the next call reads them where this one wrote.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class CapturedStep:
    """A function that is captured in a CUDA graph at its second call and replayed from then on.

    The first call runs ``step`` itself, which compiles kernels and allocates what stays: no call
    is thrown away for warm-up, and random numbers are consumed as without a graph. A step that
    cannot be captured raises; it never runs slowly instead.

    Args:
        step: takes tensors on ``device``. What it returns, and its Python code, are those of the
            captured call: a number in its result stays the same.
        device: a GPU.
    """

    def __init__(self, step: Callable[..., Any], device: torch.device) -> None:
        self._step, self._device = step, device
        self._stream: torch.cuda.Stream | None = None
        self._replay: Callable[[], None] | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the step on ``inputs``, whose shapes and dtypes stay those of the first call.

        Returns:
            The result of ``step``; its tensors are overwritten by the next call.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
            self._inputs = tuple(given.clone() for given in inputs)
            return _run_on(self._stream, self._step, *inputs)
        self._check(inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        if self._replay is None:
            step = partial(self._step, *self._inputs)
            self._replay, self._result = _capture(step, self._stream)
        self._replay()
        return self._result

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        held, given = ([(tuple(t.shape), t.dtype) for t in ts] for ts in (self._inputs, inputs))
        if held != given:
            raise ValueError(f"CapturedStep: inputs must stay {held}, got {given}")


def _run_on(stream: torch.cuda.Stream, step: Callable[..., Any], *inputs: Tensor) -> Any:
    """Run ``step`` on the stream of the capture: autograd keeps the stream of its first call."""
    outside = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        result = step(*inputs)
    outside.wait_stream(stream)
    return result


def _capture(step: Callable[[], Any], stream: torch.cuda.Stream) -> tuple[Callable[[], None], Any]:
    """Record the launches of ``step``; return what replays them, and the result they write."""
    with torch.cuda.device(stream.device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = step()
    return graph.replay, result
