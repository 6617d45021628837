"""The calls of the losses that are compiled for every target, and what their code must keep."""

from dataclasses import replace

import torch

from emu3_kernels.ops.loss.chunking import ALIGN, CLASSES_IN_DHEAD, whole
from emu3_kernels.ops.loss.triton import add_, backward, forward, gradient_
from emu3_kernels.runtime.contracts import Config, Contract, meta

VOCABULARY = 184622
"""Emu3's: the misalignment of its bfloat16 rows takes every even value."""

# Three programs a multiprocessor, or two where smoothed, and 24 KiB of each in flight. Narrow are
# the head and tail of a row (a thread has a whole vector), its target, weight, target logit and
# normalizer; stored are a loss and two numbers of the softmax.
SUMS = Contract(
    max_registers=104,
    scalar_loads=2 * 8 + 4,
    scalar_stores=3,
    async_copies=True,
    exceptions={"gfx942: async_copies": "copies to shared memory are 4 bytes wide before gfx950"},
)
SMOOTHED = replace(SUMS, max_registers=120)
# Narrow beside head and tail: a target, its logit and the four numbers of the state, both ways.
ADD = replace(SUMS, scalar_loads=2 * 8 + 6, scalar_stores=4)
# One program, which reads 16 bytes of targets, losses and weights for each token.
REDUCE = Contract(
    max_registers=96, scalar_loads=1 + 3 * 4, scalar_stores=3, few_programs="it adds up all tokens"
)
# All the threads that a multiprocessor holds. Narrow are target, weight, dout and its divisor, two
# numbers of the softmax and, in the first program of a row, its head and tail.
GRADIENT = Contract(max_registers=32, scalar_loads=7, scalar_stores=1)


def _cross_entropy(smoothing: float, *, weighted: bool, backwards: bool = False) -> None:
    logits, targets = meta(4096, VOCABULARY), meta(4096, dtype=torch.int64)
    weights = meta(4096, dtype=torch.float32) if weighted else None
    one, saved = meta(dtype=torch.float32), meta(2 + 2 * 4096, dtype=torch.float32)
    if backwards:
        backward(one, logits, targets, weights, saved, 0.0, smoothing, -100)
    else:
        forward(logits, targets, weights, None, None, 0.0, smoothing, -100, "mean")


def _linear_cross_entropy(first: int, *, smoothing: float = 0.0, backwards: bool = False) -> None:
    """Some classes of 2,048 tokens: a whole chunk, or the last ones."""
    end = min(first + CLASSES_IN_DHEAD, VOCABULARY)
    logits = meta(2048, -(-(end - first) // ALIGN) * ALIGN)[:, : end - first]
    targets, dlosses = meta(2048, dtype=torch.int64), meta(2048, dtype=torch.float32)
    if backwards:
        softmax = meta(2048, 2, dtype=torch.float32)
        gradient_(logits, targets, softmax, dlosses, first, VOCABULARY, 0.0, smoothing)
    else:
        add_(logits, targets, meta(2048, 4, dtype=torch.float64), first, smoothing)


_FWD = {"cross_entropy_fwd_kernel": SUMS, "cross_entropy_reduce_kernel": REDUCE}
_BWD = {"cross_entropy_bwd_kernel": GRADIENT}
_ADD = {"linear_cross_entropy_add_kernel": ADD}
_LINEAR_BWD = {"linear_cross_entropy_bwd_kernel": GRADIENT}
_LAST = whole(VOCABULARY)
CONFIGS = {
    "cross_entropy": (
        Config("4096 x 184622", lambda: _cross_entropy(0.0, weighted=False), _FWD),
        Config(
            "4096 x 184622, smoothed",
            lambda: _cross_entropy(0.1, weighted=True),
            _FWD | {"cross_entropy_fwd_kernel": SMOOTHED},
        ),
        Config("4096 x 184622", lambda: _cross_entropy(0.0, weighted=True, backwards=True), _BWD),
    ),
    "linear_cross_entropy": (
        Config("2048, first chunk", lambda: _linear_cross_entropy(0), _ADD),
        Config(
            "2048, ragged, smoothed",
            lambda: _linear_cross_entropy(_LAST, smoothing=0.1),
            {"linear_cross_entropy_add_kernel": replace(ADD, max_registers=120)},
        ),
        Config("2048, first chunk", lambda: _linear_cross_entropy(0, backwards=True), _LINEAR_BWD),
        Config("2048, ragged", lambda: _linear_cross_entropy(_LAST, backwards=True), _LINEAR_BWD),
    ),
}
