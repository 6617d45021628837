"""The calls of the losses that are compiled for every target, and what their code must keep."""

from dataclasses import replace

import torch

from emu3_kernels.ops.loss.chunking import MEMORY, bytes_of_copies, chunking
from emu3_kernels.ops.loss.triton import add_, backward, forward, gradient_
from emu3_kernels.runtime.contracts import Config, Contract, meta

VOCABULARY = 184622
"""Emu3's: the misalignment of its bfloat16 rows takes every even value."""

# Two programs of 96 registers a multiprocessor, 24 KiB of each in flight. Narrow are the head and
# tail of a row (a thread has a whole vector), its weight, target and target logit; stored are a
# loss and two numbers of the softmax.
SUMS = Contract(
    max_registers=96,
    scalar_loads=2 * 8 + 3,
    scalar_stores=3,
    async_copies=True,
    exceptions={"gfx942: async_copies": "copies to shared memory are 4 bytes wide before gfx950"},
)
SMOOTHED = replace(
    SUMS,
    exceptions=SUMS.exceptions | {"sm_90, triton 3.6: registers": "one program less on an SM"},
)
# Narrow beside head and tail: a target, its logit and the four numbers of the state, both ways.
ADD = replace(SUMS, scalar_loads=2 * 8 + 6, scalar_stores=4)
# All the threads that a multiprocessor holds. Narrow are dloss, target, two numbers of the softmax
# and, in the first program of a row, its head and tail.
GRADIENT = Contract(max_registers=32, scalar_loads=5, scalar_stores=1)


def _cross_entropy(smoothing: float, *, backwards: bool = False) -> None:
    logits, targets = meta(256, VOCABULARY), meta(256, dtype=torch.int64)
    weights, softmax = meta(256, dtype=torch.float32), meta(256, 2, dtype=torch.float32)
    if backwards:
        backward(weights, logits, targets, softmax, 0.0, smoothing)
    else:
        forward(logits, targets, weights, 0.0, smoothing)


def _linear_cross_entropy(first: int, *, smoothing: float = 0.0, backwards: bool = False) -> None:
    """2,048 tokens, in the chunks of the default memory."""
    head = meta(VOCABULARY, 4096)
    memory = MEMORY + bytes_of_copies(2048 * head.shape[1], head.dtype)
    width = chunking(2048, *head.shape, head.dtype, memory, wants_head=True).classes
    logits = meta(2048, width)[:, : VOCABULARY - first]
    targets, dlosses = meta(2048, dtype=torch.int64), meta(2048, dtype=torch.float32)
    if backwards:
        softmax = meta(2048, 2, dtype=torch.float32)
        gradient_(logits, targets, softmax, dlosses, first, VOCABULARY, 0.0, smoothing)
    else:
        add_(logits, targets, meta(2048, 4, dtype=torch.float64), first, smoothing)


_FWD, _BWD = {"cross_entropy_fwd_kernel": SUMS}, {"cross_entropy_bwd_kernel": GRADIENT}
_ADD = {"linear_cross_entropy_add_kernel": ADD}
CONFIGS = {
    "cross_entropy": (
        Config("256 x 184622", lambda: _cross_entropy(0.0), _FWD),
        Config(
            "256 x 184622, smoothed",
            lambda: _cross_entropy(0.1),
            {"cross_entropy_fwd_kernel": SMOOTHED},
        ),
        Config("256 x 184622", lambda: _cross_entropy(0.0, backwards=True), _BWD),
    ),
    "linear_cross_entropy": (
        Config("2048, first chunk", lambda: _linear_cross_entropy(0), _ADD),
        Config(
            "2048, ragged, smoothed", lambda: _linear_cross_entropy(180_000, smoothing=0.1), _ADD
        ),
        Config("2048, first chunk", lambda: _linear_cross_entropy(0, backwards=True), _BWD),
        Config("2048, ragged", lambda: _linear_cross_entropy(180_000, backwards=True), _BWD),
    ),
}
