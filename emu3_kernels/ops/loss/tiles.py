"""How many logits exist at a time: tiles of tokens and classes within the memory.

N tokens that count, D model width, V classes.
"""

from typing import NamedTuple

import torch

MEMORY = 512 << 20
"""Bytes that a call may take beside its gradients and what is as large as hidden, by default.

In bfloat16 they hold the sum of the gradient of Emu3's head at D = 512 and the logits of 896
tokens, an eighth of what eager takes for 2,048, and no product is made twice: all logits at once
are no faster, three quarters of the memory take nothing more either, a half takes 18 % longer and
a quarter 22 % (measured, avx2, two threads).
"""
ALIGN = 64
"""Rows and columns of a tile come in these: whole cache lines, whole tiles of a product."""
MIN_TOKENS = 64
MIN_CLASSES = 1024
"""In a tile at the least, whatever the memory: a thinner product wastes the processor."""
MIN_TOKENS_SUMMED = 256
"""Fewer, and to add a dhead to its float32 sum costs more than to multiply again (measured)."""
PART = 1024
"""Classes of one product for dhead: with more, oneDNN gives each thread a float32 copy of it."""
SCRATCH = 8 << 20
"""Bytes in which products pack their operands: 1 to 5 MiB with 1 to 32 threads (measured). Not a
function of their number, on which no result may depend."""
VECTORS = 128
"""Bytes per token for what is as long as the targets: sums, losses, indices."""


class Tile(NamedTuple):
    """Either all classes of some tokens, or some classes of all tokens."""

    tokens: int
    classes: int
    sums_dhead: bool
    """Whether the dheads of tiles are added up in float32, beyond the dtype of the head."""


def tile(
    num_tokens: int,
    num_classes: int,
    width: int,
    dtype: torch.dtype,
    memory: int,
    *,
    wants_head: bool,
) -> Tile:
    """Choose the cheapest tile that keeps within ``memory``.

    All classes of some tokens cost no product twice, but their dheads add up: for nothing where
    dhead is float32, in 2 V D bytes where it is narrower. Some classes of all tokens cost a second
    product of the logits beyond one tile, since a gradient needs the sum over all classes, so the
    tiles are as wide as fits and the first takes what is left; and a float32 sum of dhidden: with
    its newest part, before and after that is widened.
    """
    size = dtype.itemsize
    memory -= SCRATCH + VECTORS * num_tokens
    row = size * aligned(num_classes) + (2 * size + 4) * width  # also of hidden, dhidden, its sum
    fits = memory // row
    if num_tokens <= max(fits, 0):
        return Tile(max(num_tokens, 1), num_classes, False)
    if not wants_head or size >= 4:
        return Tile(_even(num_tokens, fits, MIN_TOKENS), num_classes, False)
    fits = (memory - 2 * width * num_classes - (size + 4) * width * PART) // row
    if fits >= MIN_TOKENS_SUMMED:
        return Tile(_even(num_tokens, fits, MIN_TOKENS), num_classes, True)
    fits = (memory - copies_of(num_tokens * width, dtype)) // (size * num_tokens)
    return Tile(num_tokens, max(fits // ALIGN * ALIGN, MIN_CLASSES), False)


def copies_of(size: int, dtype: torch.dtype) -> int:
    """Count the bytes of copies of a hidden of ``size`` numbers, of dhidden and its float32 sum.

    The newest part of the sum is one more.
    """
    return size * (2 * dtype.itemsize + 8)


def aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def _even(count: int, fits: int, least: int) -> int:
    """Cut ``count`` into the fewest equal tiles of at most ``fits``."""
    num_tiles = -(-count // max(fits // ALIGN * ALIGN, least))
    return aligned(-(-count // max(num_tiles, 1)))
