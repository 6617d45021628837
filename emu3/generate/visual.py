"""Images and clips from captions.

Tokens that the grammar forces are not sampled and cost no forward pass of their own: the end of a
row is fed with the token before it, and nothing after the last visual token is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import prod

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
from emu3.generate.path import Forwards, PathDecoder
from emu3.generate.window import PLAIN, Window
from emu3.model import Emu3
from emu3.prompt import clip_prompt, frame_ids, image_prompt
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


def generate_images(
    model: Emu3,
    text: TextTokenizer,
    captions: Sequence[str],
    grid: tuple[int, int],
    how: Sampling = Sampling(),
    seeds: int | Sequence[int] = 0,
    *,
    window: Window = PLAIN,
    spent: Forwards | None = None,
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
        window: tokens of an image that a forward feeds; any gives the same image, up to near-ties.
        spent: is filled with the forwards of each image.
        cuda_graph: replay a decode step as a CUDA graph; None does so on a GPU, but under
            ``torch.autocast``, which casts weights anew in each step.

    Raises:
        ValueError: logits that are not finite, at the end of their row of codes.
    """
    opening = image_prompt(grid, text)
    tails = [opening] * len(captions)
    codes = _draw(model, text, captions, tails, (1, *grid), how, seeds, window, spent, cuda_graph)
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
    window: Window = PLAIN,
    spent: Forwards | None = None,
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
        window: as in :func:`generate_images`.
        spent: as in :func:`generate_images`.
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
    codes = _draw(
        model, text, captions, tails, (left, *grid), how, seeds, window, spent, cuda_graph
    )
    return torch.cat((known.to(codes), codes), dim=1)


@torch.no_grad()
def _draw(
    model: Emu3,
    text: TextTokenizer,
    captions: Sequence[str],
    tails: Sequence[list[int]],
    shape: tuple[int, int, int],
    how: Sampling,
    seeds: int | Sequence[int],
    window: Window,
    spent: Forwards | None,
    cuda_graph: bool | None,
) -> Tensor:
    """Draw frames ``[B, t, h, w]`` after ``BOS caption tail``, of which the negative has the same.

    The last code of a row is fed with EOL, that of a frame with EOL and EOF.
    """
    check_prompts(model, captions)
    window.check(shape[0])
    ids, (frames, height, width) = text.vocabulary, shape
    negatives = [] if how.guidance == 1 else [how.negative] * len(captions)
    words = [*captions, *negatives]
    tails = [*tails, *tails][: len(words)]
    prompts = [[ids.bos, *text.encode(one), *tail] for one, tail in zip(words, tails, strict=True)]
    tokens, prompt_lengths = to_device_of(model, *pad_right(prompts, ids.pad))
    # The last forward feeds the last but one code.
    capacity = tokens.shape[1] + frames * (height * (width + 1) + 1) - 3
    _check_room(model, words, capacity, text)
    visual_rows = slice(ids.visual_start, ids.size)
    keys, places = to_device_of(
        model, _keys(seeds, len(captions)), torch.zeros(len(captions)).long()
    )
    settings = {"guidance": how.guidance, "top_k": how.top_k, "top_p": how.top_p}
    settings |= {"temperature": how.temperature}
    graph, spent = uses_graph(model, cuda_graph), spent or Forwards()
    if window.size > 1:
        shapes = [shape] * len(captions)
        paths = PathDecoder(model, ids, prompts, shapes, keys, window, settings, graph)
        return torch.stack(paths.run(spent)).unflatten(1, shape)

    def next_codes(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = model.logits(hidden, visual_rows)
        pair = logits.chunk(2) if negatives else (logits, None)
        code = sample_guided(*pair, keys, places, **settings)[:, 0]
        places.add_(1)
        token = (code + ids.visual_start).repeat(len(prompts) // len(captions))
        return code, token, logits

    cache = new_cache(model, len(prompts), capacity)
    decoder = Decoder(model, cache, next_codes, graph)
    codes = tokens.new_empty(len(captions), *shape)
    code = decoder.start(tokens, prompt_lengths)
    for frame, row, column in product(*map(range, shape)):
        if frame + row + column:
            forced = [] if column else [ids.eol] if row else [ids.eol, ids.eof]
            code = decoder.step(*forced)
        codes[:, frame, row, column] = code
        if column == width - 1:
            decoder.check_finite()
    spent.codes = spent.forwards = [prod(shape) - 1] * len(captions)
    return codes


def _keys(seeds: int | Sequence[int], count: int) -> Tensor:
    """``[B]`` int64 with the 64 bits of each seed."""
    found = [seeds + i for i in range(count)] if isinstance(seeds, int) else list(seeds)
    if len(found) != count:
        raise ValueError(f"generate: seeds must be one or {count}, got {len(found)}")
    return torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in found])


def _check_room(model: Emu3, captions: Sequence[str], needed: int, text: TextTokenizer) -> None:
    room = model.settings.max_position_embeddings
    if needed > room:
        longest = max(captions, key=lambda words: len(text.encode(words)))
        length = len(text.encode(longest))
        raise ValueError(
            f"generate: a caption may have {max(0, length - needed + room)} tokens beside its "
            f"image or clip, got {length}: {longest[:40]!r}"
        )
