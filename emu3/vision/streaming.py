"""A long video piece by piece, in constant memory."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from emu3.vision.tokenizer import VisionTokenizer
from emu3_kernels.modules import Memory


def encode_stream(tokenizer: VisionTokenizer, clips: Iterable[Tensor]) -> Iterator[Tensor]:
    """Codes ``[B, t, h, w]`` of each ``[B, T, 3, H, W]`` in turn, T a multiple of 4.

    Bit for bit those of ``tokenizer.encode`` on the whole video: each temporal layer keeps
    the frames that its next call needs.
    """
    memory: Memory = {}
    for clip in clips:
        _check_clip(tokenizer, clip)
        yield tokenizer.encode_clip(clip, memory)


def decode_stream(tokenizer: VisionTokenizer, codes: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pixels ``[B, 4 t, 3, H, W]`` of each ``[B, t, h, w]`` in turn, as if decoded as one."""
    memory: Memory = {}
    for part in codes:
        _check_codes(tokenizer, part)
        yield tokenizer.decode_clip(part, memory)


def encode_pieces(tokenizer: VisionTokenizer, clips: Iterable[Tensor]) -> Iterator[Tensor]:
    """Codes as ``encode_stream`` returns them, but of every 4 frames independently.

    This is how the official ``autoencode.py`` encodes video, and gives the best reconstruction.
    """
    for clip in clips:
        _check_clip(tokenizer, clip)
        apart = clip.unflatten(1, (-1, tokenizer.settings.temporal_factor)).flatten(0, 1)
        yield tokenizer.encode(apart).unflatten(0, (len(clip), -1)).flatten(1, 2)


def decode_pieces(tokenizer: VisionTokenizer, codes: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pixels as ``decode_stream`` returns them, but of every frame of codes independently."""
    for part in codes:
        _check_codes(tokenizer, part)
        apart = part.flatten(0, 1).unsqueeze(1)
        yield tokenizer.decode(apart).unflatten(0, (len(part), -1)).flatten(1, 2)


def _check_clip(tokenizer: VisionTokenizer, clip: Tensor) -> None:
    if tokenizer.check_pixels(clip):
        raise ValueError(
            f"VisionTokenizer: a clip is [B, T, 3, H, W], got {tuple(clip.shape)}, an image"
        )


def _check_codes(tokenizer: VisionTokenizer, codes: Tensor) -> None:
    if tokenizer.check_codes(codes):
        raise ValueError(
            f"VisionTokenizer: a clip's codes must be [B, t, h, w], got {tuple(codes.shape)}"
        )
