"""The decode loop: captions to images and clips, and prompts of any parts to text.

Tokens that the grammar forces are not sampled and cost no forward pass of their own: the end of a
row is fed with the token before it, and nothing after the last visual token is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.cache import KeyValueCache
from emu3.cuda_graph import CapturedStep
from emu3.model import Emu3
from emu3.prompt import clip_prompt, frame_ids, image_prompt, understanding_prompt
from emu3.text import TextTokenizer
from emu3_kernels import sample_guided


@dataclass(frozen=True)
class Sampling:
    """How a code is drawn: the settings of :func:`emu3_kernels.sample_guided`."""

    guidance: float = 3.0
    """Scale of classifier-free guidance; 1 turns it off."""
    top_k: int | None = 2048
    top_p: float | None = None
    temperature: float = 1.0
    negative: str = ""
    """The negative prompt: the caption of the unconditional branch."""


def pad_right(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the right: ids ``[B, T]`` and the prompt lengths ``[B]``."""
    prompt_lengths = torch.tensor([len(ids) for ids in prompts])
    longest = int(prompt_lengths.max())
    return torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in prompts]), prompt_lengths


def generate_images(
    model: Emu3,
    text: TextTokenizer,
    captions: Sequence[str],
    grid: tuple[int, int],
    how: Sampling = Sampling(),
    seeds: int | Sequence[int] = 0,
    *,
    cuda_graph: bool | None = None,
) -> Tensor:
    """Generate one image per caption, as codes ``[B, h, w]`` int64.

    Captions and negative prompts run as one batch, and only the visual rows of the head are
    computed.

    Args:
        model: in eval mode.
        text: its tokenizer.
        captions: one for each image.
        grid: rows and columns of codes.
        how: guidance and sampling.
        seeds: one for each image, of 64 bits: the same image comes alone and in any batch, up to
            near-ties of logits. An int is the seed of the first, and counts up.
        cuda_graph: replay a decode step as a CUDA graph; None does so on a GPU, but under
            ``torch.autocast``, which casts weights anew in each step.

    Raises:
        ValueError: logits that are not finite, at the end of their row of codes.
    """
    opening = image_prompt(grid, text)
    tails = [opening] * len(captions)
    codes = _draw(model, text, captions, tails, (1, *grid), how, seeds, cuda_graph)
    return codes[:, 0]


def generate_clips(
    model: Emu3,
    text: TextTokenizer,
    captions: Sequence[str],
    shape: tuple[int, int, int],
    fps: Fraction,
    how: Sampling = Sampling(),
    seeds: int | Sequence[int] = 0,
    *,
    given: Tensor | None = None,
    span: int = 4,
    cuda_graph: bool | None = None,
) -> Tensor:
    """Generate one clip per caption, as codes ``[B, t, h, w]`` int64.

    Args:
        model: in eval mode.
        text: its tokenizer.
        captions: one for each clip.
        shape: frames, rows and columns of codes.
        fps: frames of pixels a second, told to the model.
        how: guidance and sampling.
        seeds: as in :func:`generate_images`, and the error too.
        given: ``[B, s, h, w]`` codes of the first s < t frames, which begin the result: of an image
            to animate, or of a clip to continue.
        span: frames of pixels of a frame of codes.
        cuda_graph: as in :func:`generate_images`.
    """
    frames, *grid = shape
    known = torch.empty(len(captions), 0, *grid, dtype=torch.int64) if given is None else given
    if known.ndim != 4 or len(known) != len(captions) or known.shape[2:] != (*grid,):
        raise ValueError(
            f"generate: given frames must be [{len(captions)}, s, {grid[0]}, {grid[1]}], "
            f"got {tuple(known.shape)}"
        )
    left = frames - known.shape[1]
    if left < 1:
        raise ValueError(f"generate: a clip must have more than the {known.shape[1]} given frames")
    opening = clip_prompt((*grid,), frames, fps, text, span)
    tails = [
        [*opening, *(frame_ids(one.cpu(), text.vocabulary) if len(one) else [])] for one in known
    ]
    codes = _draw(model, text, captions, tails, (left, *grid), how, seeds, cuda_graph)
    return torch.cat((known.to(codes), codes), dim=1)


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
    _check(model, prompts)
    ids = text.vocabulary
    tokens, prompt_lengths = _on(model, *pad_right(prompts, ids.pad))
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

    cache = _cache(model, len(prompts), capacity)
    decoder = _Decoder(model, cache, next_tokens, _uses_graph(model, cuda_graph))
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


@torch.no_grad()
def _draw(
    model: Emu3,
    text: TextTokenizer,
    captions: Sequence[str],
    tails: Sequence[list[int]],
    shape: tuple[int, int, int],
    how: Sampling,
    seeds: int | Sequence[int],
    cuda_graph: bool | None,
) -> Tensor:
    """Draw frames ``[B, t, h, w]`` after ``BOS caption tail``, of which the negative has the same.

    The last code of a row is fed with EOL, that of a frame with EOL and EOF.
    """
    _check(model, captions)
    ids, (frames, height, width) = text.vocabulary, shape
    negatives = [] if how.guidance == 1 else [how.negative] * len(captions)
    words = [*captions, *negatives]
    tails = [*tails, *tails][: len(words)]
    prompts = [[ids.bos, *text.encode(one), *tail] for one, tail in zip(words, tails, strict=True)]
    tokens, prompt_lengths = _on(model, *pad_right(prompts, ids.pad))
    # The last forward feeds the last but one code.
    capacity = tokens.shape[1] + frames * (height * (width + 1) + 1) - 3
    _check_room(model, words, capacity, text)
    visual_rows = slice(ids.visual_start, ids.size)
    keys, places = _on(model, _keys(seeds, len(captions)), torch.zeros(len(captions)).long())
    settings = {"guidance": how.guidance, "top_k": how.top_k, "top_p": how.top_p}

    def next_codes(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = model.logits(hidden, visual_rows)
        pair = logits.chunk(2) if negatives else (logits, None)
        code = sample_guided(*pair, keys, places, temperature=how.temperature, **settings)[:, 0]
        places.add_(1)
        token = (code + ids.visual_start).repeat(len(prompts) // len(captions))
        return code, token, logits

    cache = _cache(model, len(prompts), capacity)
    decoder = _Decoder(model, cache, next_codes, _uses_graph(model, cuda_graph))
    codes = tokens.new_empty(len(captions), *shape)
    code = decoder.start(tokens, prompt_lengths)
    for frame, row, column in product(*map(range, shape)):
        if frame + row + column:
            forced = [] if column else [ids.eol] if row else [ids.eol, ids.eof]
            code = decoder.step(*forced)
        codes[:, frame, row, column] = code
        if column == width - 1:
            decoder.check_finite()
    return codes


class _Decoder:
    """Feeds the tokens of the last step to the model, without a word from the GPU to the host.

    Args:
        model: in eval mode.
        cache: empty.
        choose: from hidden states ``[B, D]`` to what a step returns, the ``[B]`` tokens that the
            next one feeds, and the logits.
        graph: whether to replay steps as CUDA graphs.
    """

    def __init__(
        self,
        model: Emu3,
        cache: KeyValueCache,
        choose: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
        graph: bool,
    ) -> None:
        self.model, self.cache, self.choose, self.graph = model, cache, choose, graph
        self.token = torch.zeros_like(cache.lengths, dtype=torch.int64)
        self.largest: Tensor | None = None
        """``[B]``, the magnitude of each row's largest logit over all steps; NaN stays NaN."""
        self._steps: dict[tuple[int, ...], Callable[[], Tensor]] = {}

    def start(self, tokens: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Feed the prompts ``tokens [B, T]``."""
        hidden = self.model(tokens, self.cache, prompt_lengths=prompt_lengths)
        rows = torch.arange(len(hidden), device=hidden.device)
        return self._next(hidden[rows, prompt_lengths - 1])

    def step(self, *forced: int) -> Tensor:
        """Feed each row's last token and, after it, the ``forced`` ones."""
        if forced not in self._steps:
            step = partial(self._feed, forced)
            self._steps[forced] = CapturedStep(step, self.token.device) if self.graph else step
        cache, num_new = self.cache, 1 + len(forced)
        cache.check_room(num_new)
        longest = cache.longest + num_new
        result = self._steps[forced]()
        cache.longest = longest  # a replay runs no Python
        return result

    def check_finite(self) -> None:
        """Raise if logits of a step were not finite; on a GPU, the host waits for it here alone."""
        if self.largest is not None and not self.largest.isfinite().all():
            raise ValueError(
                "generate: logits must be finite, got NaN or infinity: check the weights, and that "
                "the model's dtype has their range"
            )

    def _feed(self, forced: tuple[int, ...]) -> Tensor:
        tokens = self.token[:, None]
        for one in forced:
            tokens = F.pad(tokens, (0, 1), value=one)
        return self._next(self.model(tokens, self.cache)[:, -1])

    def _next(self, hidden: Tensor) -> Tensor:
        result, token, logits = self.choose(hidden)
        self.token.copy_(token)
        largest = logits.amax(-1).abs()
        if self.largest is None:
            self.largest = largest
        else:
            torch.maximum(self.largest, largest, out=self.largest)
        return result


def _keys(seeds: int | Sequence[int], count: int) -> Tensor:
    """``[B]`` int64 with the 64 bits of each seed."""
    found = [seeds + i for i in range(count)] if isinstance(seeds, int) else list(seeds)
    if len(found) != count:
        raise ValueError(f"generate: seeds must be one or {count}, got {len(found)}")
    return torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in found])


def _uses_graph(model: Emu3, asked: bool | None) -> bool:
    device = model.head.weight.device
    casts = torch.is_autocast_enabled(device.type)
    if asked is None:
        return device.type == "cuda" and not casts
    if asked and (device.type != "cuda" or casts):
        got = "torch.autocast" if casts else f"one on {device}"
        raise ValueError(
            f"generate: cuda_graph needs a model on a GPU, without autocast, got {got}"
        )
    return asked


def _cache(model: Emu3, batch: int, capacity: int) -> KeyValueCache:
    like = model.head(model.head.weight[:0])  # dtype of keys and values, under autocast too
    return KeyValueCache(model.settings, batch, capacity, dtype=like.dtype, device=like.device)


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
            f"image or clip, got {length}: {longest[:40]!r}"
        )


def _on(model: Emu3, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(model.head.weight.device) for tensor in tensors]
