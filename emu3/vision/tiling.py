"""Large images in overlapping tiles, to bound the memory of convolutions and attention.

Approximate: group norms and attention are computed per tile, so codes and pixels differ from those
of the whole image. Overlaps are blended.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from emu3.vision.tokenizer import VisionTokenizer

TILE, OVERLAP = 512, 128


@torch.no_grad()
def encode_tiled(
    tokenizer: VisionTokenizer, pixels: Tensor, *, tile: int = TILE, overlap: int = OVERLAP
) -> Tensor:
    """Codes as ``tokenizer.encode`` returns them, approximately; blended before quantization.

    Args:
        tile: side of a tile in pixels.
        overlap: pixels that a tile shares with the next, less than half of it.
    """
    is_image, side = tokenizer.check_pixels(pixels), tokenizer.settings.spatial_factor
    _check(tile, overlap, side)
    frames = pixels[:, None] if is_image else pixels
    latents = blend(tokenizer.latents, frames, tile // side, overlap // side, shrink=side)
    codes = tokenizer.quantize.codes(latents)
    return codes[:, 0] if is_image else codes


@torch.no_grad()
def decode_tiled(
    tokenizer: VisionTokenizer, codes: Tensor, *, tile: int = TILE, overlap: int = OVERLAP
) -> Tensor:
    """Pixels as ``tokenizer.decode`` returns them, approximately; sides as in ``encode_tiled``."""
    tokenizer.check_codes(codes)
    side = tokenizer.settings.spatial_factor
    _check(tile, overlap, side)
    return blend(tokenizer.decode, codes, tile // side, overlap // side, grow=side)


def blend(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    *,
    shrink: int = 1,
    grow: int = 1,
) -> Tensor:
    """Apply ``function`` to tiles of the last two dimensions of ``x`` and blend what it returns.

    The weight of a tile falls linearly to its edges over the overlap; at every position the
    weights are normalised. ``tile`` and ``overlap`` count codes; ``x`` has ``shrink`` elements
    to a code, and the result has ``grow``.
    """
    height, width = (size // shrink for size in x.shape[-2:])
    total, weights = None, None
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            rows, columns = (slice(top, top + tile), slice(left, left + tile))
            part = function(x[..., _scaled(rows, shrink), _scaled(columns, shrink)])
            weight = _ramp(part, overlap * grow)
            if total is None:
                total = part.new_zeros(*part.shape[:-2], height * grow, width * grow)
                weights = part.new_zeros(height * grow, width * grow)
            place = ..., _scaled(rows, grow), _scaled(columns, grow)
            total[place] += part * weight
            weights[place] += weight
    return total / weights


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Starts of the tiles; the last tile ends with the image."""
    last = max(0, size - tile)
    return [*range(0, last, tile - overlap), last]


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)


def _ramp(part: Tensor, overlap: int) -> Tensor:
    sides = []
    for size in part.shape[-2:]:
        place = torch.arange(size, device=part.device, dtype=part.dtype)
        edge = torch.minimum(place, size - 1 - place) + 1
        sides.append((edge / (overlap + 1)).clamp(max=1))
    return sides[0][:, None] * sides[1]


def _check(tile: int, overlap: int, side: int) -> None:
    if tile % side or overlap % side or not 0 <= overlap < tile / 2:
        raise ValueError(
            f"VisionTokenizer: tile and overlap must be multiples of {side}, overlap from 0 "
            f"to less than half of tile, got {tile} and {overlap}"
        )
