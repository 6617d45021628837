"""The decode loop: captions to images, and images to captions.

Tokens that the grammar forces are not sampled and cost no forward pass of their own: the end of a
row is fed with the token before it, and nothing after the last visual token is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.cache import KeyValueCache
from emu3.model import Emu3
from emu3.prompt import generation_prompt, understanding_prompt
from emu3.sampling import apply_cfg, sample
from emu3.text import TextTokenizer


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled."""

    guidance: float = 3.0
    """Scale of classifier-free guidance; 1 turns it off."""
    top_k: int | None = 2048
    temperature: float = 1.0
    negative: str = ""
    """The negative prompt: the caption of the unconditional branch."""


def pad_right(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the right: ids ``[B, T]`` and the prompt lengths ``[B]``."""
    prompt_lengths = torch.tensor([len(ids) for ids in prompts])
    longest = int(prompt_lengths.max())
    return torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in prompts]), prompt_lengths


@torch.no_grad()
def generate_images(
    model: Emu3,
    text: TextTokenizer,
    captions: Sequence[str],
    grid: tuple[int, int],
    how: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Generate one image per caption, as codes ``[B, h, w]`` int64.

    Captions and negative prompts run as one batch, and only the visual rows of the head are
    computed. ``model`` must be in eval mode.
    """
    _check(model, captions)
    ids, (height, width) = text.vocabulary, grid
    negatives = [] if how.guidance == 1 else [how.negative] * len(captions)
    prompts = [generation_prompt(words, grid, text) for words in [*captions, *negatives]]
    tokens, prompt_lengths = _on(model, *pad_right(prompts, ids.pad))
    # The last forward feeds the last but one token of the grid.
    capacity = tokens.shape[1] + height * (width + 1) - 2
    _check_room(model, [*captions, *negatives], capacity, text)
    cache = _cache(model, len(prompts), capacity)
    visual_rows = slice(ids.visual_start, ids.size)
    codes = tokens.new_empty(len(captions), height, width)
    for row in range(height):
        for column in range(width):
            hidden = _last_hidden(model, tokens, cache, prompt_lengths)
            logits = model.logits(hidden, visual_rows)
            if negatives:
                logits = apply_cfg(*logits.chunk(2), how.guidance)
            code = sample(logits, top_k=how.top_k, temperature=how.temperature, generator=generator)
            codes[:, row, column] = code
            tokens = (code + ids.visual_start).repeat(len(prompts) // len(captions))[:, None]
            prompt_lengths = None
        tokens = F.pad(tokens, (0, 1), value=ids.eol)
    return codes


@torch.no_grad()
def generate_captions(
    model: Emu3, text: TextTokenizer, codes: Tensor, max_new_tokens: int = 64
) -> list[str]:
    """Caption images ``codes [B, h, w]``, greedily; only text ids and EOS are generated."""
    _check(model, codes)
    ids = text.vocabulary
    prompts = [understanding_prompt(one, text) for one in codes]
    tokens, prompt_lengths = _on(model, *pad_right(prompts, ids.pad))
    capacity = tokens.shape[1] + max_new_tokens - 1
    cache = _cache(model, len(prompts), capacity)
    text_rows, end_row = slice(ids.num_text), slice(ids.eos, ids.eos + 1)
    written = []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        hidden = _last_hidden(model, tokens, cache, prompt_lengths)
        logits = torch.cat([model.logits(hidden, rows) for rows in (text_rows, end_row)], dim=-1)
        best = logits.argmax(-1)
        token = best.masked_fill(ended | (best == ids.num_text), ids.eos)
        ended |= token == ids.eos
        if ended.all():
            break
        written.append(token)
        tokens, prompt_lengths = token[:, None], None
    rows = torch.stack(written, 1).tolist() if written else [[] for _ in prompts]
    return [text.decode([i for i in row if i != ids.eos]) for row in rows]


def _cache(model: Emu3, batch: int, capacity: int) -> KeyValueCache:
    like = model.head(model.head.weight[:0])  # dtype of keys and values, under autocast too
    return KeyValueCache(model.settings, batch, capacity, dtype=like.dtype, device=like.device)


def _last_hidden(
    model: Emu3, tokens: Tensor, cache: KeyValueCache, prompt_lengths: Tensor | None
) -> Tensor:
    """Hidden state ``[B, D]`` of each row's last token, at its prompt length if there is one."""
    hidden = model(tokens, cache, prompt_lengths=prompt_lengths)
    if prompt_lengths is None:
        return hidden[:, -1]
    return hidden[torch.arange(len(hidden), device=hidden.device), prompt_lengths - 1]


def _check(model: Emu3, rows: Sequence) -> None:
    if model.training:
        raise ValueError("generate: the model must be in eval mode, call model.eval() first")
    if len(rows) == 0:
        raise ValueError("generate: nothing to continue, got an empty batch")


def _check_room(model: Emu3, captions: Sequence[str], needed: int, text: TextTokenizer) -> None:
    room = model.settings.max_position_embeddings
    if needed > room:
        longest = max(captions, key=lambda words: len(text.encode(words)))
        length = len(text.encode(longest))
        raise ValueError(
            f"generate: a caption may have {max(0, length - needed + room)} tokens beside its "
            f"image, got {length}: {longest[:40]!r}"
        )


def _on(model: Emu3, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(model.head.weight.device) for tensor in tensors]
