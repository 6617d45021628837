"""How many logits exist at a time: chunks of tokens or of classes within the memory.

N valid tokens, D model width, V classes.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

MEMORY = 512 << 20
"""Bytes that a call may take beside its gradients and what is as large as hidden, by default.

In bfloat16 they hold the sum of the gradient of Emu3's head at D = 512 and the logits of 896
tokens, an eighth of what eager takes for 2,048, and no GEMM runs twice: all logits at once are no
faster, three quarters of the memory take no longer either, a half takes 18 % longer and a quarter
22 % (measured, avx2, two threads).
"""
ALIGN = 64
"""Tokens and classes of a chunk are multiples of this: whole cache lines, whole GEMM tiles."""
MIN_TOKENS = 64
MIN_CLASSES = 1024
"""Of a chunk, whatever the memory: a thinner GEMM wastes the processor."""
MIN_TOKENS_SUMMED = 256
"""With fewer, adding a dhead to its float32 sum costs more than a second GEMM (measured)."""
DHEAD_CLASSES = 1024
"""Of one GEMM for dhead: with more, oneDNN gives each thread a float32 copy of it."""
SCRATCH = 8 << 20
"""Bytes in which a GEMM packs its operands: 1 to 5 MiB with 1 to 32 threads (measured). Not a
function of their number, on which no result may depend."""
BYTES_PER_TOKEN = 128
"""For what is as long as the targets: softmax states, losses, indices."""

MOST_GPU_MEMORY = 4 << 30
"""Bytes that a call takes on a GPU by default, at most: no GEMM of 15,000 tokens of Emu3-8B runs
twice."""
GEMM_CLASSES = 128
"""On a GPU, GEMMs take multiples of this: the widest tile of cuBLAS."""
CLASSES_IN_DHEAD = 4096
"""Of a chunk in the memory of dhead. More make the float32 sum of dhidden, 8 D bytes per token and
chunk, cheaper, and leave as many classes of D tokens of that memory unused."""
TOKENS_OF_DHIDDEN = 2048
"""Of one float32 sum of dhidden: two waves of tiles on 132 multiprocessors at D = 4096."""
MIN_TOKENS_OF_SUM = 2048
"""On a GPU, with fewer per chunk, adding a dhead to its float32 sum costs a quarter of its GEMM:
8 V D bytes at 4 TB/s beside 2 V D operations per token at 750 TFLOP/s (counted)."""


class Chunking(NamedTuple):
    """Either all classes of some tokens, or some classes of all tokens."""

    tokens: int
    classes: int
    sums_dhead: bool
    """Whether the dheads of chunks are added up in float32, beyond the dtype of the head."""


def chunking(
    num_tokens: int,
    num_classes: int,
    width: int,
    dtype: torch.dtype,
    memory: int,
    *,
    wants_head: bool,
) -> Chunking:
    """Choose the cheapest chunks that keep within ``memory``.

    Chunks of tokens, with all classes, run no GEMM twice, but their dheads add up: at no cost
    where dhead is float32, in 2 V D bytes where it is narrower. Chunks of classes, with all tokens,
    run the GEMM of the logits a second time for all but one chunk, since a gradient needs the sum
    over all classes; so the chunks are as large as fits, and the first takes the remainder. They
    also need a float32 sum of dhidden, and memory for its newest part before and after the cast.
    """
    size = dtype.itemsize
    memory -= SCRATCH + BYTES_PER_TOKEN * num_tokens
    # Of a token: its logits, and copies of its hidden, dhidden and the float32 sum of that.
    row = size * aligned(num_classes) + (2 * size + 4) * width
    fits = memory // row
    if num_tokens <= max(fits, 0):
        return Chunking(max(num_tokens, 1), num_classes, False)
    if not wants_head or size >= 4:
        return Chunking(_even(num_tokens, fits, MIN_TOKENS), num_classes, False)
    fits = (memory - 2 * width * num_classes - (size + 4) * width * DHEAD_CLASSES) // row
    if fits >= MIN_TOKENS_SUMMED:
        return Chunking(_even(num_tokens, fits, MIN_TOKENS), num_classes, True)
    fits = (memory - bytes_of_copies(num_tokens * width, dtype)) // (size * num_tokens)
    return Chunking(num_tokens, max(fits // ALIGN * ALIGN, MIN_CLASSES), False)


def gpu_chunking(
    num_tokens: int,
    num_classes: int,
    width: int,
    dtype: torch.dtype,
    memory: int,
    *,
    wants_head: bool,
) -> Chunking:
    """As :func:`chunking`, on a GPU, where dhead stores logits until it is computed.

    So with a gradient for the head, ``classes`` is what a buffer holds beside dhead. If no memory
    holds the rest of the classes, their GEMM runs twice; if these are more than a quarter of all,
    chunks of tokens and a float32 dhead of all classes are cheaper, where there is memory for it.
    """
    size = dtype.itemsize
    memory -= SCRATCH + BYTES_PER_TOKEN * num_tokens
    row = size * aligned(num_classes) + (2 * size + 4) * width
    if not wants_head:
        return Chunking(_even(num_tokens, memory // row, MIN_TOKENS), num_classes, False)
    in_dhead = CLASSES_IN_DHEAD * len(starts_in_dhead(num_tokens, num_classes, width))
    rest = whole(num_classes) - in_dhead
    # A copy of hidden, the last classes, and the float32 sum of dhidden: of a block or of all.
    copies = size * num_tokens * (width + GEMM_CLASSES)
    block = min(num_tokens, TOKENS_OF_DHIDDEN) * (size + 4) * width
    if rest * size * num_tokens <= memory - copies - block:
        return Chunking(num_tokens, max(rest, GEMM_CLASSES), False)
    copies += (size + 4) * width * num_tokens
    classes = max(whole((memory - copies) // (size * num_tokens)), MIN_CLASSES)
    if rest - classes > num_classes // 4:
        fits = (memory - 4 * width * (num_classes + GEMM_CLASSES)) // row
        if fits >= MIN_TOKENS_OF_SUM:
            return Chunking(_even(num_tokens, fits, MIN_TOKENS), num_classes, True)
    return Chunking(num_tokens, classes, False)


def starts_in_dhead(num_tokens: int, num_classes: int, width: int) -> list[int]:
    """Return where dhead ``[V, D]`` stores logits of the last classes, from the last chunk on.

    A chunk of N tokens and ``CLASSES_IN_DHEAD`` classes is stored below its own rows of dhead and
    below the chunks after it. So dheads that are computed from the last to the first overwrite no
    logits that are still needed.
    """
    starts, limit, first = [], width * num_classes, whole(num_classes)
    while (first := first - CLASSES_IN_DHEAD) > 0:
        limit = min(limit, first * width) - num_tokens * CLASSES_IN_DHEAD
        if limit < 0:
            break
        starts.append(limit)
    return starts


def default_memory(hidden: Tensor) -> int:
    """Return the bytes that a call takes by default: MEMORY, and copies of ``hidden``."""
    return MEMORY + bytes_of_copies(hidden.numel(), hidden.dtype)


def gpu_memory(hidden: Tensor, *, shared: bool, grows: bool) -> int:
    """Return the bytes that a call takes by default on a GPU.

    With a gradient for the head they grow to an eighth of the device. They do not depend on what
    is free, so that two runs give the same bits, nor on the device where ranks ``share`` a head.
    """
    least = default_memory(hidden)
    if shared or not grows or not hidden.is_cuda:
        return least
    return max(least, min(_total_memory(hidden.get_device()) // 8, MOST_GPU_MEMORY))


@cache
def _total_memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def whole(num_classes: int) -> int:
    """Round down to what GEMMs on a GPU take."""
    return max(num_classes, 0) // GEMM_CLASSES * GEMM_CLASSES


def bytes_of_copies(numel: int, dtype: torch.dtype) -> int:
    """Count the bytes of copies of hidden and dhidden, ``numel`` elements each.

    And of the float32 sum of dhidden and the newest part of that sum.
    """
    return numel * (2 * dtype.itemsize + 8)


def aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def _even(count: int, fits: int, least: int) -> int:
    """Divide ``count`` into the fewest equal chunks of at most ``fits``."""
    num_chunks = -(-count // max(fits // ALIGN * ALIGN, least))
    return aligned(-(-count // max(num_chunks, 1)))
