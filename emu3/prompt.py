"""The token grammar, both ways.

An image of ``h`` by ``w`` codes is ``boi "h*w" img_token`` row EOL … row EOL ``EOF eoi``. A clip is
``boi "h*w, fps fps, seconds s" img_token`` and then its frames of codes, each as the rows of an
image and EOF, and ``eoi``. A document is text, images and clips in any order between BOS and EOS.
All functions are pure.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.config import Vocabulary
from emu3.text import TextTokenizer

_SIZE = r"([1-9]\d*)\*([1-9]\d*)"
_META = re.compile(rf"{_SIZE}(?:, (\d+(?:\.\d+)?) fps, (\d+(?:\.\d+)?) s)?")


@dataclass(frozen=True)
class Clip:
    """A video of ``[t, h, w]`` codes; a frame of codes is ``span`` frames of pixels."""

    codes: Tensor
    fps: Fraction
    """Frames of pixels a second."""
    span: int = 4
    """The temporal factor of the vision tokenizer."""


Part = str | Tensor | Clip
"""Text, an image as ``[h, w]`` codes, or a clip."""


def image_prompt(grid: tuple[int, int], text: TextTokenizer) -> list[int]:
    """``boi "h*w" img_token``: an image of ``grid`` codes follows."""
    return _opening(f"{grid[0]}*{grid[1]}", text)


def clip_prompt(
    grid: tuple[int, int], frames: int, fps: Fraction, text: TextTokenizer, span: int = 4
) -> list[int]:
    """``boi meta img_token``: a clip of ``frames`` frames of codes follows.

    The meta text is the grid, the frame rate and the duration, with at most three decimals:
    ``"64*64, 24 fps, 5 s"``.
    """
    seconds = frames * span / fps
    meta = f"{grid[0]}*{grid[1]}, {_decimal(fps)} fps, {_decimal(seconds)} s"
    return _opening(meta, text)


def generation_prompt(caption: str, grid: tuple[int, int], text: TextTokenizer) -> list[int]:
    """``BOS caption boi "h*w" img_token``: the model generates the image."""
    return [text.vocabulary.bos, *text.encode(caption), *image_prompt(grid, text)]


def generation_document(caption: str, codes: Tensor, text: TextTokenizer) -> list[int]:
    """A caption and then its image: ``BOS caption image EOS``."""
    return document([caption, codes], text)


def understanding_prompt(codes: Tensor, text: TextTokenizer) -> list[int]:
    """``BOS image``: the model generates the caption."""
    return [text.vocabulary.bos, *image_ids(codes, text)]


def understanding_document(codes: Tensor, caption: str, text: TextTokenizer) -> list[int]:
    """An image and then its caption: ``BOS image caption EOS``."""
    return document([codes, caption], text)


def document(parts: Sequence[Part], text: TextTokenizer) -> list[int]:
    """``BOS part … part EOS``."""
    return [text.vocabulary.bos, *content_ids(parts, text), text.vocabulary.eos]


def content_ids(parts: Sequence[Part], text: TextTokenizer) -> list[int]:
    """Ids of text, images and clips in their order; adjacent texts are encoded as one."""
    ids, words = [], ""
    for part in parts:
        if isinstance(part, str):
            words += part
            continue
        ids += text.encode(words)
        words = ""
        ids += clip_ids(part, text) if isinstance(part, Clip) else image_ids(part, text)
    return ids + text.encode(words)


def image_ids(codes: Tensor, text: TextTokenizer) -> list[int]:
    """Ids of one image from ``boi`` to ``eoi``.

    Args:
        codes: ``[h, w]`` int64, each below ``num_visual``.
        text: encodes the size "h*w".
    """
    if codes.ndim != 2 or codes.numel() == 0:
        raise ValueError(f"prompt: codes must be [h, w] and not empty, got {tuple(codes.shape)}")
    opening = image_prompt(tuple(codes.shape), text)
    return [*opening, *frame_ids(codes[None], text.vocabulary), text.vocabulary.eoi]


def clip_ids(clip: Clip, text: TextTokenizer) -> list[int]:
    """Ids of one clip from ``boi`` to ``eoi``."""
    shape = tuple(clip.codes.shape)
    if len(shape) != 3 or clip.codes.numel() == 0:
        raise ValueError(f"prompt: codes must be [t, h, w] and not empty, got {shape}")
    opening = clip_prompt(shape[1:], shape[0], clip.fps, text, clip.span)
    return [*opening, *frame_ids(clip.codes, text.vocabulary), text.vocabulary.eoi]


def frame_ids(codes: Tensor, ids: Vocabulary) -> list[int]:
    """Ids of frames ``[t, h, w]``: rows that end in EOL, and EOF after each frame."""
    if codes.min() < 0 or codes.max() >= ids.num_visual:
        raise ValueError(f"prompt: codes must be in [0, {ids.num_visual})")
    rows = F.pad(codes + ids.visual_start, (0, 1), value=ids.eol).flatten(1)
    return F.pad(rows, (0, 1), value=ids.eof).flatten().tolist()


def forced_token(
    offset: int, grid: tuple[int, int], ids: Vocabulary, frames: int = 1
) -> int | None:
    """The id that the grammar forces ``offset`` positions after ``img_token``.

    None means any visual token; after EOS it is padding.
    """
    height, width = grid
    frame = height * (width + 1) + 1
    end = frames * frame
    if offset > end:
        return {1: ids.eoi, 2: ids.eos}.get(offset - end, ids.pad)
    inside = (offset - 1) % frame + 1
    if inside == frame:
        return ids.eof
    return ids.eol if inside % (width + 1) == 0 else None


def parse_document(ids: Sequence[int], text: TextTokenizer, span: int = 4) -> list[Part]:
    """Return the parts of a document; no text is empty.

    Raises:
        ValueError: the position of the first error, what was expected there and what was found.
    """
    names = text.vocabulary
    _expect(ids, 0, names.bos, "BOS")
    eos = _find(ids, 1, names.eos, "EOS")
    parts, at = [], 1
    while at < eos:
        boi = next((i for i in range(at, eos) if ids[i] == names.boi), eos)
        if boi > at:
            parts.append(_text(ids, at, boi, text))
        if boi == eos:
            break
        part, at = _parse_visual(ids, boi, text, span)
        parts.append(part)
    return parts


def _opening(meta: str, text: TextTokenizer) -> list[int]:
    ids = text.vocabulary
    return [ids.boi, *text.encode(meta), ids.img_token]


def _decimal(number: Fraction | float) -> str:
    return f"{float(number):.3f}".rstrip("0").rstrip(".")


def _parse_visual(
    ids: Sequence[int], boi: int, text: TextTokenizer, span: int
) -> tuple[Tensor | Clip, int]:
    """The image or clip that ``boi`` opens, and the position after its ``eoi``."""
    names = text.vocabulary
    img = _find(ids, boi + 1, names.img_token, "img_token")
    meta = _META.fullmatch(_text(ids, boi + 1, img, text))
    if meta is None:
        raise ValueError(
            'prompt: the size after boi must be "h*w" or "h*w, fps fps, seconds s", '
            f"at position {boi + 1}"
        )
    grid = int(meta[1]), int(meta[2])
    if meta[3] is None:
        codes, eoi = _parse_frames(ids, img, grid, 1, names)
        return codes[0], eoi + 1
    fps = Fraction(meta[3])
    frames = round(Fraction(meta[4]) * fps / span)
    codes, eoi = _parse_frames(ids, img, grid, frames, names)
    return Clip(codes, fps, span), eoi + 1


def _parse_frames(
    ids: Sequence[int], img: int, grid: tuple[int, int], frames: int, names: Vocabulary
) -> tuple[Tensor, int]:
    """Codes ``[t, h, w]`` after ``img_token``, and the position of ``eoi``."""
    eoi = img + frames * (grid[0] * (grid[1] + 1) + 1) + 1
    codes = []
    for offset in range(1, eoi - img + 1):
        forced = forced_token(offset, grid, names, frames)
        if forced is not None:
            label = {names.eol: "EOL", names.eof: "EOF", names.eoi: "eoi"}[forced]
            _expect(ids, img + offset, forced, label)
            continue
        token = ids[img + offset] if img + offset < len(ids) else None
        if token is None or not names.visual_start <= token < names.size:
            raise ValueError(
                f"prompt: a visual token must be at position {img + offset}, got {token}"
            )
        codes.append(token - names.visual_start)
    return torch.tensor(codes).view(frames, *grid), eoi


def _expect(ids: Sequence[int], at: int, token: int, name: str) -> None:
    got = ids[at] if at < len(ids) else None
    if got != token:
        raise ValueError(f"prompt: {name} ({token}) must be at position {at}, got {got}")


def _find(ids: Sequence[int], start: int, token: int, name: str) -> int:
    for at in range(start, len(ids)):
        if ids[at] == token:
            return at
    raise ValueError(f"prompt: no {name} ({token}) after position {start - 1}")


def _text(ids: Sequence[int], start: int, stop: int, text: TextTokenizer) -> str:
    for at in range(start, stop):
        if not 0 <= ids[at] < text.vocabulary.num_text:
            raise ValueError(f"prompt: text must be at position {at}, got {ids[at]}")
    return text.decode(list(ids[start:stop]))
