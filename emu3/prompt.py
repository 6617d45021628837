"""The token grammar, both ways.

An image of ``h`` by ``w`` codes is ``boi "h*w" img_token`` row EOL … row EOL ``EOF eoi``.
With text before it, it is a generation document; with text after it, an understanding document;
both are between BOS and EOS. All functions are pure.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emu3.config import Vocabulary
from emu3.text import TextTokenizer


@dataclass(frozen=True)
class Document:
    """An image (``[h, w]`` codes) and the text before and after it."""

    before: str
    codes: Tensor
    after: str


def generation_prompt(caption: str, grid: tuple[int, int], text: TextTokenizer) -> list[int]:
    """``BOS caption boi "h*w" img_token``: the model generates the image."""
    ids = text.vocabulary
    return [ids.bos, *text.encode(caption), *_opening(grid, text)]


def generation_document(caption: str, codes: Tensor, text: TextTokenizer) -> list[int]:
    """A caption and then its image: ``BOS caption image EOS``."""
    ids = text.vocabulary
    return [ids.bos, *text.encode(caption), *image_ids(codes, text), ids.eos]


def understanding_prompt(codes: Tensor, text: TextTokenizer) -> list[int]:
    """``BOS image``: the model generates the caption."""
    return [text.vocabulary.bos, *image_ids(codes, text)]


def understanding_document(codes: Tensor, caption: str, text: TextTokenizer) -> list[int]:
    """An image and then its caption: ``BOS image caption EOS``."""
    return [*understanding_prompt(codes, text), *text.encode(caption), text.vocabulary.eos]


def image_ids(codes: Tensor, text: TextTokenizer) -> list[int]:
    """Ids of one image from ``boi`` to ``eoi``.

    Args:
        codes: ``[h, w]`` int64, each below ``num_visual``.
        text: encodes the size "h*w".
    """
    ids = text.vocabulary
    if codes.ndim != 2 or codes.numel() == 0:
        raise ValueError(f"prompt: codes must be [h, w] and not empty, got {tuple(codes.shape)}")
    if codes.min() < 0 or codes.max() >= ids.num_visual:
        raise ValueError(f"prompt: codes must be in [0, {ids.num_visual})")
    rows = torch.nn.functional.pad(codes + ids.visual_start, (0, 1), value=ids.eol)
    return [*_opening(tuple(codes.shape), text), *rows.flatten().tolist(), ids.eof, ids.eoi]


def forced_token(offset: int, grid: tuple[int, int], ids: Vocabulary) -> int | None:
    """The id that the grammar forces ``offset`` positions after ``img_token``.

    None means any visual token; after EOS it is padding.
    """
    height, width = grid
    end = height * (width + 1)
    if offset <= end:
        return ids.eol if offset % (width + 1) == 0 else None
    return {1: ids.eof, 2: ids.eoi, 3: ids.eos}.get(offset - end, ids.pad)


def parse_document(ids: Sequence[int], text: TextTokenizer) -> Document:
    """Parse a generation or understanding document.

    Raises:
        ValueError: the position of the first error, what was expected there and what was found.
    """
    names = text.vocabulary
    _expect(ids, 0, names.bos, "BOS")
    boi = _find(ids, 1, names.boi, "boi")
    img = _find(ids, boi + 1, names.img_token, "img_token")
    size = re.fullmatch(r"([1-9]\d*)\*([1-9]\d*)", _text(ids, boi + 1, img, text))
    if size is None:
        raise ValueError(f'prompt: the size after boi must be "h*w", at position {boi + 1}')
    grid = int(size[1]), int(size[2])
    codes, eoi = _parse_rows(ids, img, grid, names)
    eos = _find(ids, eoi + 1, names.eos, "EOS")
    return Document(_text(ids, 1, boi, text), codes, _text(ids, eoi + 1, eos, text))


def _opening(grid: tuple[int, int], text: TextTokenizer) -> list[int]:
    height, width = grid
    ids = text.vocabulary
    return [ids.boi, *text.encode(f"{height}*{width}"), ids.img_token]


def _parse_rows(
    ids: Sequence[int], img: int, grid: tuple[int, int], names: Vocabulary
) -> tuple[Tensor, int]:
    eoi = img + grid[0] * (grid[1] + 1) + 2
    codes = []
    for offset in range(1, eoi - img + 1):
        forced = forced_token(offset, grid, names)
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
    return torch.tensor(codes).view(grid), eoi


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
