"""Text after prompts of any parts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from emu3.generate.decoder import (
    Decoder,
    check_prompts,
    new_cache,
    pad_right,
    to_device_of,
    uses_graph,
)
from emu3.model import Emu3
from emu3.prompt import understanding_prompt
from emu3.text import TextTokenizer


def generate_captions(
    model: Emu3,
    text: TextTokenizer,
    codes: Tensor,
    max_new_tokens: int = 64,
    *,
    cuda_graph: bool | None = None,
) -> list[str]:
    """Caption images ``codes [B, h, w]``: :func:`generate_text` after each image alone."""
    prompts = [understanding_prompt(one, text) for one in codes]
    return generate_text(model, text, prompts, max_new_tokens, cuda_graph=cuda_graph)


@torch.no_grad()
def generate_text(
    model: Emu3,
    text: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 1024,
    *,
    cuda_graph: bool | None = None,
) -> list[str]:
    """Continue ``prompts``, such as those of :func:`emu3.templates.chat_prompt`, greedily.

    Only text ids and EOS, which ends a text, are generated. ``cuda_graph`` and the error are those
    of :func:`generate_images`.
    """
    check_prompts(model, prompts)
    ids = text.vocabulary
    tokens, prompt_lengths = to_device_of(model, *pad_right(prompts, ids.pad))
    capacity = tokens.shape[1] + max_new_tokens - 1
    if capacity > (room := model.settings.max_position_embeddings):
        raise ValueError(
            f"generate: a prompt may have {max(0, room - max_new_tokens + 1)} tokens before "
            f"{max_new_tokens} new ones, got {tokens.shape[1]}"
        )
    text_rows, end_row = slice(ids.num_text), slice(ids.eos, ids.eos + 1)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=tokens.device)

    def next_tokens(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.cat([model.logits(hidden, rows) for rows in (text_rows, end_row)], dim=-1)
        best = logits.argmax(-1)
        token = best.masked_fill(ended | (best == ids.num_text), ids.eos)
        ended.logical_or_(token == ids.eos)
        return token, token, logits

    cache = new_cache(model, len(prompts), capacity)
    decoder = Decoder(model, cache, next_tokens, uses_graph(model, cuda_graph))
    written = []
    for index in range(max_new_tokens):
        token = decoder.step() if index else decoder.start(tokens, prompt_lengths)
        written.append(token.clone())
        # An ended text goes on with EOS, which is removed: a GPU is asked now and then.
        if (not ended.is_cuda or index % 8 == 7) and ended.all():
            break
    decoder.check_finite()
    rows = torch.stack(written, 1).tolist() if written else [[] for _ in prompts]
    return [text.decode([i for i in row if i != ids.eos]) for row in rows]
