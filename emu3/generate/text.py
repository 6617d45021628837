"""Text after prompts of any parts."""

from collections.abc import Sequence

from torch import Tensor

from emu3.generate.batch import GREEDY, Batch, Generation
from emu3.generate.decoder import check_prompts, uses_graph
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
    if max_new_tokens < 1:
        return [""] * len(prompts)
    vocabulary = text.vocabulary
    written = [Generation([ids], max_new_tokens, None, GREEDY) for ids in prompts]
    capacity = max(one.capacity for one in written)
    if capacity > (room := model.settings.max_position_embeddings):
        raise ValueError(
            f"generate: a prompt may have {max(0, room - max_new_tokens + 1)} tokens before "
            f"{max_new_tokens} new ones, got {max(map(len, prompts))}"
        )
    graph = uses_graph(model, cuda_graph)
    read_every = 8 if model.head.weight.is_cuda else 1
    batch = Batch(model, vocabulary, len(prompts), capacity, graph=graph, read_every=read_every)
    batch.run(written)
    return [text.decode(one.ids) for one in written]
