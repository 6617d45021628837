"""The decode loop: captions to pictures, and pictures to captions.

What the grammar forces is never sampled and costs no forward of its own: the end of a row
travels with the token before it, and what follows the last visual token is never computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.cache import KeyValueCache
from emu3.model import Emu3
from emu3.prompt import generation_prompt, understanding_prompt
from emu3.sampling import guide, sample
from emu3.text import TextTokenizer


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn."""

    guidance: float = 3.0
    """Weight of the caption over its absence; 1 turns guidance off."""
    top_k: int | None = 2048
    temperature: float = 1.0
    negative: str = ""
    """The caption that guidance leads away from."""


def pad_right(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Left-align prompts: ids ``[B, T]``, and how many of each row are no padding ``[B]``."""
    counts = torch.tensor([len(ids) for ids in prompts])
    longest = int(counts.max())
    return torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in prompts]), counts


@torch.no_grad()
def generate_images(
    model: Emu3,
    text: TextTokenizer,
    captions: Sequence[str],
    grid: tuple[int, int],
    how: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one picture per caption, as codes ``[B, h, w]`` int64.

    Captions and their negatives run as one batch, and only the visual rows of the head are
    multiplied. ``model`` must be in eval mode.
    """
    _check(model, captions)
    ids, (height, width) = text.vocabulary, grid
    negatives = [] if how.guidance == 1 else [how.negative] * len(captions)
    prompts = [generation_prompt(words, grid, text) for words in [*captions, *negatives]]
    tokens, counts = _on(model, *pad_right(prompts, ids.pad))
    # The last forward feeds the last but one token of the grid.
    capacity = tokens.shape[1] + height * (width + 1) - 2
    cache = _cache(model, len(prompts), capacity)
    visual_rows = slice(ids.visual_start, ids.size)
    codes = tokens.new_empty(len(captions), height, width)
    for row in range(height):
        for column in range(width):
            hidden = _last_hidden(model, tokens, cache, counts)
            logits = model.logits(hidden, visual_rows)
            if negatives:
                logits = guide(*logits.chunk(2), how.guidance)
            code = sample(logits, top_k=how.top_k, temperature=how.temperature, generator=generator)
            codes[:, row, column] = code
            tokens = (code + ids.visual_start).repeat(len(prompts) // len(captions))[:, None]
            counts = None
        tokens = F.pad(tokens, (0, 1), value=ids.eol)
    return codes


@torch.no_grad()
def generate_captions(
    model: Emu3, text: TextTokenizer, codes: Tensor, max_new_tokens: int = 64
) -> list[str]:
    """Describe pictures ``codes [B, h, w]``, greedily; only text ids and EOS may follow."""
    _check(model, codes)
    ids = text.vocabulary
    prompts = [understanding_prompt(one, text) for one in codes]
    tokens, counts = _on(model, *pad_right(prompts, ids.pad))
    capacity = tokens.shape[1] + max_new_tokens - 1
    cache = _cache(model, len(prompts), capacity)
    text_rows, end_row = slice(ids.num_text), slice(ids.eos, ids.eos + 1)
    written = []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        hidden = _last_hidden(model, tokens, cache, counts)
        logits = torch.cat([model.logits(hidden, rows) for rows in (text_rows, end_row)], dim=-1)
        best = logits.argmax(-1)
        token = best.masked_fill(ended | (best == ids.num_text), ids.eos)
        ended |= token == ids.eos
        if ended.all():
            break
        written.append(token)
        tokens, counts = token[:, None], None
    rows = torch.stack(written, 1).tolist() if written else [[] for _ in prompts]
    return [text.decode([i for i in row if i != ids.eos]) for row in rows]


def _cache(model: Emu3, batch: int, capacity: int) -> KeyValueCache:
    like = model.head(model.head.weight[:0])  # as keys and values are, under autocast too
    return KeyValueCache(model.settings, batch, capacity, dtype=like.dtype, device=like.device)


def _last_hidden(
    model: Emu3, tokens: Tensor, cache: KeyValueCache, counts: Tensor | None
) -> Tensor:
    """Hidden state ``[B, D]`` of each row's last token: of a prompt's ``counts``, or of all."""
    hidden = model(tokens, cache, counts=counts)
    if counts is None:
        return hidden[:, -1]
    return hidden[torch.arange(len(hidden), device=hidden.device), counts - 1]


def _check(model: Emu3, rows: Sequence) -> None:
    if model.training:
        raise ValueError("generate: the model must be in eval mode, call model.eval() first")
    if len(rows) == 0:
        raise ValueError("generate: nothing to continue, got an empty batch")


def _on(model: Emu3, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(model.head.weight.device) for tensor in tensors]
