"""Images and clips from captions."""

from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from emu3.generate.batch import SPARE, USUAL, Batch, Generation, Sampling, all_seeds
from emu3.generate.common import check_prompts, uses_graph
from emu3.generate.path import Forwards, PathDecoder, Watch
from emu3.generate.window import PLAIN, Window
from emu3.model import Emu3
from emu3.prompt import clip_prompt, frame_ids, image_prompt
from emu3.text import TextTokenizer


class _Loop(NamedTuple):
    """How codes are drawn, which does not change them."""

    window: Window
    spent: Forwards
    cuda_graph: bool | None
    watch: Watch | None


def generate_images(
    model: Emu3,
    text: TextTokenizer,
    captions: Sequence[str],
    grid: tuple[int, int] | Sequence[tuple[int, int]],
    how: Sampling = USUAL,
    seeds: int | Sequence[int] = 0,
    *,
    window: Window = PLAIN,
    spent: Forwards | None = None,
    cuda_graph: bool | None = None,
    watch: Watch | None = None,
) -> Tensor | list[Tensor]:
    """Generate one image per caption, as codes ``[B, h, w]`` int64, or a list with a grid for each.

    Captions and negative prompts run as one batch, and only the visual rows of the head are
    computed.

    Args:
        model: in eval mode.
        text: its tokenizer.
        captions: one for each image.
        grid: rows and columns of codes, of all images or one for each caption.
        how: guidance and sampling.
        seeds: one for each image, of 64 bits: the same image comes alone and in any batch, up to
            near-ties of logits. An int is the seed of the first, and counts up.
        window: tokens of an image that a forward feeds; any gives the same image, up to near-ties.
        spent: is filled with the forwards of each image.
        cuda_graph: replay a decode step as a CUDA graph; None does so on a GPU, but under
            ``torch.autocast``, which casts weights anew in each step.
        watch: called where a row of codes ends, with the codes ``[n]`` of each image so far.

    Raises:
        ValueError: logits that are not finite, at the end of their row of codes.
    """
    alike = isinstance(grid[0], int) if len(grid) else False
    grids = [grid] * len(captions) if alike else list(grid)
    if len(grids) != len(captions):
        raise ValueError(f"generate: grids must be one or {len(captions)}, got {len(grids)}")
    tails, shapes = [image_prompt(one, text) for one in grids], [(1, *one) for one in grids]
    loop = _Loop(window, spent or Forwards(), cuda_graph, watch)
    codes = [one[0] for one in _draw(model, text, captions, tails, shapes, how, seeds, loop)]
    return torch.stack(codes) if alike else codes


def generate_clips(
    model: Emu3,
    text: TextTokenizer,
    captions: Sequence[str],
    shape: tuple[int, int, int],
    fps: Fraction,
    how: Sampling = USUAL,
    seeds: int | Sequence[int] = 0,
    *,
    given: Tensor | None = None,
    span: int = 4,
    window: Window = PLAIN,
    spent: Forwards | None = None,
    cuda_graph: bool | None = None,
    watch: Watch | None = None,
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
        watch: as there; of the frames that are not given.
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
    shapes = [(left, *grid)] * len(captions)
    loop = _Loop(window, spent or Forwards(), cuda_graph, watch)
    codes = torch.stack(_draw(model, text, captions, tails, shapes, how, seeds, loop))
    return torch.cat((known.to(codes), codes), dim=1)


def _draw(
    model: Emu3,
    text: TextTokenizer,
    captions: Sequence[str],
    tails: Sequence[list[int]],
    shapes: Sequence[tuple[int, int, int]],
    how: Sampling,
    seeds: int | Sequence[int],
    loop: _Loop,
) -> list[Tensor]:
    """Draw frames ``[t, h, w]`` each after ``BOS caption tail``; the negative has the same tail."""
    check_prompts(model, captions)
    loop.window.check(max((shape[0] for shape in shapes), default=1))
    bos, keys = text.vocabulary.bos, all_seeds(seeds, len(captions))
    negatives = [] if how.guidance == 1 else [how.negative]
    generations = [
        Generation(
            [[bos, *text.encode(words), *tail] for words in (caption, *negatives)],
            prod(shape),
            shape[1:],
            how,
            seed,
        )
        for caption, tail, shape, seed in zip(captions, tails, shapes, keys, strict=True)
    ]
    spare = SPARE if len(set(shapes)) > 1 and loop.window.size == 1 else 0
    _check_room(model, captions, generations, spare, how, text)
    capacity = max(one.capacity for one in generations) + spare
    num_rows = len(captions) * (1 + len(negatives))
    graph, watch = uses_graph(model, loop.cuda_graph), loop.watch
    if loop.window.size > 1:
        paths = PathDecoder(model, text.vocabulary, generations, shapes, loop.window, graph)
        return paths.run(loop.spent, watch)
    loop.spent.codes = loop.spent.forwards = [one.length - 1 for one in generations]
    batch = Batch(model, text.vocabulary, num_rows, capacity, graph=graph)

    def tell() -> None:
        if any(one.place % one.grid[1] == 0 for one in generations):
            watch([batch.drawn(one) for one in generations])

    batch.run(generations, None if watch is None else tell)
    return [one.codes.view(shape) for one, shape in zip(generations, shapes, strict=True)]


def _check_room(
    model: Emu3,
    captions: Sequence[str],
    generations: Sequence[Generation],
    spare: int,
    how: Sampling,
    text: TextTokenizer,
) -> None:
    room = model.settings.max_position_embeddings
    index = max(range(len(captions)), key=lambda i: generations[i].capacity)
    if (needed := generations[index].capacity + spare) > room:
        words = max((captions[index], how.negative), key=lambda one: len(text.encode(one)))
        length = len(text.encode(words))
        raise ValueError(
            f"generate: a caption may have {max(0, length - needed + room)} tokens beside its "
            f"image or clip, got {length}: {words[:40]!r}"
        )
