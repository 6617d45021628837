"""Path decoding: several codes of an image a forward, the same that one code a forward gives.

Each forward of the model feeds a window of drafts for each image (:mod:`emu3.generate.window`).
Images advance at their own pace; the windows of those that are done change nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from emu3.cache import Tree
from emu3.config import Vocabulary
from emu3.cuda_graph import CapturedStep
from emu3.generate.batch import Generation, signed
from emu3.generate.common import check_finite, new_cache, pad_right, to_device_of
from emu3.generate.window import Layout, Paths, Window
from emu3.model import Emu3
from emu3_kernels import sample_guided

Watch = Callable[[Sequence[Tensor]], None]
_ASK_EVERY = 8
"""Forwards after which a GPU is asked whether all images are done."""


@dataclass
class Forwards:
    """What was spent on images, without their prompts; filled by a call that is given it."""

    codes: list[int] = field(default_factory=list)
    """Of each image, but the first, which comes of the prompt."""
    forwards: list[int] = field(default_factory=list)
    """That drew them."""

    @property
    def codes_per_forward(self) -> float:
        """The mean over all images; 1 in plain decoding."""
        return sum(self.codes) / max(1, sum(self.forwards))


class PathDecoder:
    """Draws images or clips by windows; a step is one CUDA graph where asked.

    Args:
        model: in eval mode.
        ids: its vocabulary.
        generations: of ``B`` images or clips, which are drawn alike.
        shapes: frames, rows and columns of codes of each.
        window: of more than one token.
        graph: whether to replay steps as a CUDA graph.
    """

    def __init__(
        self,
        model: Emu3,
        ids: Vocabulary,
        generations: Sequence[Generation],
        shapes: Sequence[tuple[int, int, int]],
        window: Window,
        graph: bool,
    ) -> None:
        self.model, self.window, self.shapes = model, window, shapes
        self.sampling, self.per_image = generations[0].how.settings, len(generations[0].prompts)
        self.visual_rows = slice(ids.visual_start, ids.size)
        prompts = [one.prompts[side] for side in range(self.per_image) for one in generations]
        seeds = torch.tensor([signed(one.seed) for one in generations])
        self.tokens, self.prompt_lengths, self.seeds = to_device_of(
            model, *pad_right(prompts, ids.pad), seeds
        )
        self.num_codes = [one.length for one in generations]
        self.paths = Paths(Layout(shapes, self.tokens.device), max(self.num_codes), window, ids)
        # A path ends at most with the EOF after its last code.
        slots = max(prod(shape) + shape[0] * (shape[1] + 1) for shape in shapes)
        self.bound = self.tokens.shape[1] + slots
        self.cache = new_cache(model, len(prompts), self.bound + window.size)
        self.largest = torch.zeros(len(prompts), device=self.tokens.device)
        """The magnitude of each row's largest logit that decided a code; NaN stays NaN."""
        self.forwards = torch.zeros(len(shapes), dtype=torch.int64, device=self.tokens.device)
        self.step = CapturedStep(self._feed, self.tokens.device) if graph else self._feed

    @torch.no_grad()
    def run(self, spent: Forwards, watch: Watch | None = None) -> list[Tensor]:
        """Draw all images: the codes of each, ``[t, h, w]``.

        Args:
            spent: is filled.
            watch: is given the codes ``[n]`` of each image so far, now and then.
        """
        self.start()
        ask_every = _ASK_EVERY if self.largest.is_cuda else 1
        drawn = self._drawn(watch)
        for index in range(1, max(self.num_codes)):  # each forward gives a code at least
            if [len(codes) for codes in drawn] == self.num_codes:
                break
            self.step()
            if index % ask_every == 0 or index == max(self.num_codes) - 1:
                drawn = self._drawn(watch)
        spent.codes = [num - 1 for num in self.num_codes]
        spent.forwards = self.forwards.tolist()
        return [codes.view(shape) for codes, shape in zip(drawn, self.shapes, strict=True)]

    def _drawn(self, watch: Watch | None) -> list[Tensor]:
        """The codes so far; the host waits for the device here alone."""
        check_finite(self.largest)
        known = self.paths.known[:, 0].tolist()
        drawn = [codes[:num] for codes, num in zip(self.paths.codes, known, strict=True)]
        if watch is not None:
            watch(drawn)
        return drawn

    def start(self) -> None:
        """Feed the prompts and draw the first codes."""
        hidden = self.model(self.tokens, self.cache, prompt_lengths=self.prompt_lengths)
        self.cache.longest = self.bound
        rows = torch.arange(len(hidden), device=hidden.device)
        hidden, places = hidden[rows, self.prompt_lengths - 1], torch.zeros_like(self.paths.known)
        picks, logits = self._draw(hidden[:, None], places, 1)
        self._note(logits, places == 0)
        self.paths.begin(picks[:, 0, 0])

    def _feed(self) -> None:
        nodes = self.paths.nodes()
        self.forwards += (self.paths.known < self.paths.layout.num_codes)[:, 0]
        tree = Tree(self._rows(nodes.depths), self._rows(nodes.mask))
        hidden = self.model(self._rows(nodes.tokens), self.cache, tree=tree)
        picks, logits = self._draw(hidden, nodes.places, self.window.drafts)
        kept = self.paths.walk(nodes, picks)
        self._note(logits, kept.decided)
        if self.window.drafts > 1:
            self.cache.move(self._rows(kept.source), self._rows(kept.target))
        self.cache.keep(self._rows(kept.counts))

    def _draw(self, hidden: Tensor, places: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return ``[B, T, num]`` codes that are drawn after ``hidden [R, T, D]``, and logits."""
        logits = self.model.logits(hidden, self.visual_rows)
        pair = logits.chunk(2) if self.per_image == 2 else (logits, None)
        return sample_guided(*pair, self.seeds, places, num=num, **self.sampling), logits

    def _note(self, logits: Tensor, decided: Tensor) -> None:
        """Keep the magnitude of the largest logit of the nodes that ``decided [B, T]`` codes."""
        largest = logits.amax(-1).abs().masked_fill(~self._rows(decided), 0).amax(1)
        torch.maximum(self.largest, largest.to(self.largest.dtype), out=self.largest)

    def _rows(self, of_images: Tensor) -> Tensor:
        """What the rows of an image share, for each row of the batch."""
        return of_images.repeat(self.per_image, *[1] * (of_images.dim() - 1))
