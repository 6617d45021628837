"""How many logits exist at a time: chunks of tokens or of classes within the memory.

N valid tokens, D model width, V classes.
"""

from typing import NamedTuple

import torch

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
