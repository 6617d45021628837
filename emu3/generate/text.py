"""Text after prompts of any parts."""

from collections.abc import Callable, Sequence

from torch import Tensor

from emu3.generate.batch import GREEDY, Batch, Generation, Sampling, all_seeds
from emu3.generate.common import check_prompts, uses_graph
from emu3.generate.past import Past
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
    how: Sampling = GREEDY,
    seeds: int | Sequence[int] = 0,
    cuda_graph: bool | None = None,
    on_text: Callable[[int, str], None] | None = None,
    past: Past | None = None,
) -> list[str]:
    """Continue ``prompts``, such as those of :func:`emu3.templates.chat_prompt`.

    Only text ids and EOS, which ends a text, are generated: greedily, or as ``how`` says without
    its guidance. ``seeds``, ``cuda_graph`` and the error are those of :func:`generate_images`.
    ``on_text`` takes the number of a prompt and the next piece of its text, of whole characters, as
    soon as there is one; together they are what is returned. With the ``past`` of a conversation,
    one prompt is fed from where it differs from the last one and its text, and is then kept there.
    """
    check_prompts(model, prompts)
    if past is not None and len(prompts) != 1:
        raise ValueError(f"generate: a past must go with one prompt, got {len(prompts)}")
    if max_new_tokens < 1:
        return [""] * len(prompts)
    vocabulary = text.vocabulary
    keys = all_seeds(seeds, len(prompts))
    written = [
        Generation([ids], max_new_tokens, None, how, seed)
        for ids, seed in zip(prompts, keys, strict=True)
    ]
    capacity = max(one.capacity for one in written)
    if capacity > (room := model.settings.max_position_embeddings):
        raise ValueError(
            f"generate: a prompt may have {max(0, room - max_new_tokens + 1)} tokens before "
            f"{max_new_tokens} new ones, got {max(map(len, prompts))}"
        )
    graph = uses_graph(model, cuda_graph)
    read_every = 8 if model.embedding.weight.is_cuda else 1
    options = {"graph": graph, "read_every": read_every, "past": past}
    batch = Batch(model, vocabulary, len(prompts), capacity, **options)
    pieces = [Pieces(text) for _ in prompts]

    def tell() -> None:
        for number, (one, of) in enumerate(zip(written, pieces, strict=True)):
            if piece := of.next(one.ids, is_last=not one.rows):
                on_text(number, piece)

    try:
        batch.run(written, None if on_text is None else tell)
    finally:
        # Once the whole prompt was fed; the last token may not have been.
        if past is not None and written[0].place:
            past.keep([*prompts[0], *written[0].ids[:-1]], batch.cache)
    return [text.decode(one.ids) for one in written]


class Pieces:
    """A text as it grows, in pieces of whole characters, of which each may have several tokens."""

    def __init__(self, text: TextTokenizer) -> None:
        self.text = text
        self._told = 0

    def next(self, ids: Sequence[int], *, is_last: bool = False) -> str:
        """What ``ids``, all tokens so far, add to the pieces before; perhaps nothing yet."""
        piece = self.text.decode(ids[self._told :])
        # A character that is cut off is decoded as this one.
        if piece.endswith("\ufffd") and not is_last:
            return ""
        self._told = len(ids)
        return piece
