"""Images to pixels in [-1, 1] and back, resized as Emu3's image processor does."""

import math

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, II, PHOTOMETRIC_INTERPRETATION, PLANAR_CONFIGURATION
from torch import Tensor

FACTOR = 8
MIN_PIXELS, MAX_PIXELS = 512 * 512, 1024 * 1024
WIDEST_ASPECT = 5

_MINISWHITE = 0
_WHITE_OF_PNG = {"L;2": 3, "L;4": 15}
_GREY16 = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
MODES = _GREY16 | {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}
"""Modes of Pillow that ``to_rgb`` takes."""
MODES_IN_WORDS = "RGB, RGBA, a palette, CMYK, or grey of 8 or 16 bits"


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = FACTOR,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """Height and width near the given ones, multiples of ``factor``, their product in the bounds.

    The aspect ratio is kept as closely as the grid allows. The bounds hold approximately: no side
    is below ``factor``, and close bounds may have no product of the grid between them.

    Raises:
        ValueError: a side is 0, or one is more than five times the other.
    """
    if min(height, width) < 1:
        raise ValueError(f"smart_resize: an image must have pixels, got {height} x {width}")
    if max(height, width) > WIDEST_ASPECT * min(height, width):
        raise ValueError(
            f"smart_resize: a side may be {WIDEST_ASPECT} times the other at most, "
            f"got {height} x {width}"
        )
    rounded = [round(side / factor) * factor for side in (height, width)]
    if math.prod(rounded) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rounded = [math.floor(side / shrink / factor) * factor for side in (height, width)]
    elif math.prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rounded = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return max(factor, rounded[0]), max(factor, rounded[1])


def preprocess(
    image: Image.Image | np.ndarray | Tensor,
    *,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Pixels ``[3, H, W]`` float32 in [-1, 1] of an image, resized (bicubic) by ``smart_resize``.

    Args:
        image: a Pillow image, converted by ``to_rgb``, or uint8 ``[H, W, 3]``.
    """
    image = _image(image)
    height, width = smart_resize(
        image.height, image.width, min_pixels=min_pixels, max_pixels=max_pixels
    )
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of one of ``MODES`` as RGB: 16-bit grey rounded to 8 bits, transparency on white.

    Colours of fully transparent pixels are lost.
    """
    if image.mode in _GREY16:
        return _grey16_to_rgb(image)
    _set_depth_of_planes(image)
    if image.has_transparency_data:
        image = _with_trns_in_8_bits(image).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def postprocess(pixels: Tensor) -> list[Image.Image]:
    """Images of ``[..., 3, H, W]`` in [-1, 1], all leading dimensions in one list."""
    if pixels.ndim < 3 or pixels.shape[-3] != 3:
        raise ValueError(f"postprocess: pixels must be [..., 3, H, W], got {tuple(pixels.shape)}")
    levels = to_levels(pixels).cpu().movedim(-3, -1).reshape(-1, *pixels.shape[-2:], 3)
    return [Image.fromarray(p.numpy()) for p in levels]


def to_levels(pixels: Tensor) -> Tensor:
    """8-bit levels of pixels in [-1, 1], others are clamped."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _set_depth_of_planes(image: Image.Image) -> None:
    """Pillow unpacks the separate planes of an uncompressed TIFF of 16 bits as 8 bits."""
    tags = getattr(image, "tag_v2", {})
    in_planes = tags.get(PLANAR_CONFIGURATION) == 2 and tags.get(BITSPERSAMPLE, (8,))[0] == 16
    if in_planes and image.tile and image.tile[0][0] == "raw":
        order = "L" if tags.prefix == II else "B"
        image.tile = [
            tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:])) for tile in image.tile
        ]


def _with_trns_in_8_bits(image: Image.Image) -> Image.Image:
    """A PNG states its transparent color in its own depth; Pillow compares it with 8 bits."""
    layout = image.tile[0][3] if image.format == "PNG" and image.tile else None
    color = image.info.get("transparency")
    if layout == "RGB;16B":
        color = tuple(level >> 8 for level in color)
    elif layout in _WHITE_OF_PNG:
        white = _WHITE_OF_PNG[layout]
        color = (color & white) * 255 // white
    else:
        return image
    image = image.copy()
    image.info["transparency"] = color
    return image


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """Also what Pillow does for 8 bits alone: the depth, MINISWHITE and the transparent level."""
    tags = getattr(image, "tag_v2", {})
    white = 2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1
    levels = np.asarray(image).astype(np.uint32)
    grey = ((levels * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == _MINISWHITE:
        grey = 255 - grey
    grey[levels == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey).convert("RGB")


def _image(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    if isinstance(image, Image.Image):
        if image.mode not in MODES:
            raise ValueError(
                f"preprocess: an image must be {MODES_IN_WORDS}, got mode {image.mode}"
            )
        return to_rgb(image)
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"preprocess: an image must be uint8 [H, W, 3], got {array.dtype} {list(array.shape)}"
        )
    if 0 in array.shape:
        raise ValueError(
            f"preprocess: an image must have pixels, got {array.shape[0]} x {array.shape[1]}"
        )
    return Image.fromarray(array)
