"""The loss of a head without its logits: a tile of them at a time, through one buffer.

T tokens, N of them that count, D model width, V classes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from emu3_kernels.ops.loss.halves import Halves
from emu3_kernels.ops.loss.shards import Shard, merged, no_sums, summed
from emu3_kernels.ops.loss.tiles import PART, aligned, tile
from emu3_kernels.runtime.gemm import mm_


class Kernels(NamedTuple):
    """What a backend does with a tile of logits ``[N, block]``, the classes from ``first`` on."""

    add_: Callable[..., None]
    """``(logits, targets, sums, first, label_smoothing)``: adds it to ``sums``: ``[N, 4]`` in
    float64, the largest logit, sum of exponentials over its own, sum and target logit."""
    gradient_: Callable[..., None]
    """``(logits, targets, denominators, dlosses, first, num_classes, z_loss, label_smoothing)``:
    overwrites it with its gradient; ``denominators`` ``[N, 2]`` are the largest logit and the
    logarithm to base 2 of the sum."""


class Settings(NamedTuple):
    """What a call is told beside its tensors: plain numbers, that an op can take."""

    z_loss: float
    label_smoothing: float
    memory: int
    first: int
    num_classes: int
    largest: int
    group: str

    @property
    def shard(self) -> Shard:
        return Shard(self.first, self.num_classes, self.largest, self.group)


def as_ops(backend: str, kernels: Kernels) -> tuple[Callable, Callable]:
    """Make ``losses`` and ``gradients`` of a backend: over all T tokens, those of weight 0 dropped.

    Both are opaque to ``torch.compile``: how many tokens count is known when they run. They may be
    Python ops because 50 microseconds a call are nothing beside their matrix products. A gradient
    that is not wanted is empty, and no product is spent on it.
    """
    name = f"emu3_kernels::linear_cross_entropy_{{}}_{backend}"

    @torch.library.custom_op(name.format("losses"), mutates_args=())
    def losses(
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        z_loss: float,
        label_smoothing: float,
        memory: int,
        first: int,
        num_classes: int,
        largest: int,
        group: str,
    ) -> Tensor:
        settings = Settings(z_loss, label_smoothing, memory, first, num_classes, largest, group)
        return _Run(kernels, (hidden, head, targets, weights), settings).go().losses

    @torch.library.custom_op(name.format("gradients"), mutates_args=())
    def gradients(
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        dlosses: Tensor,
        wants_hidden: bool,
        wants_head: bool,
        z_loss: float,
        label_smoothing: float,
        memory: int,
        first: int,
        num_classes: int,
        largest: int,
        group: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        settings = Settings(z_loss, label_smoothing, memory, first, num_classes, largest, group)
        wants = {"wants_hidden": wants_hidden, "wants_head": wants_head}
        run = _Run(kernels, (hidden, head, targets, dlosses), settings, **wants).go()
        dhidden = hidden.new_empty(0) if run.dhidden is None else run.dhidden
        dhead = head.new_empty(0) if run.dhead is None else run.dhead
        return run.losses, dhidden, dhead

    losses.register_fake(
        lambda hidden, head, targets, weights, *_: weights.new_empty(weights.shape)
    )
    gradients.register_fake(_fake_gradients)
    return losses, gradients


def _fake_gradients(hidden, head, targets, dlosses, wants_hidden, wants_head, *_):
    dhidden = hidden.new_empty(hidden.shape if wants_hidden else (0,))
    dhead = head.new_empty(head.shape if wants_head else (0,))
    return dlosses.new_empty(dlosses.shape), dhidden, dhead


class _Run:
    """One call: what it reads and writes, in the order that its tile asks for."""

    def __init__(
        self,
        kernels: Kernels,
        tokens: tuple[Tensor, Tensor, Tensor, Tensor],
        settings: Settings,
        *,
        wants_hidden: bool = False,
        wants_head: bool = False,
    ) -> None:
        self.kernels, self.settings = kernels, settings
        self.hidden, self.head, self.targets, self.dlosses = tokens
        self.kept = self.dlosses.nonzero().squeeze(1)
        num_tokens, width = len(self.kept), self.hidden.shape[1]
        kind = (width, self.hidden.dtype, settings.memory)
        self.tile = tile(num_tokens, settings.largest, *kind, wants_head=wants_head)
        classes = min(self.tile.classes, self.head.shape[0])
        self.buffer = self.hidden.new_empty(min(self.tile.tokens, num_tokens), aligned(classes))
        self.losses = torch.zeros_like(self.dlosses)
        self.dhidden = torch.zeros_like(self.hidden) if wants_hidden else None
        self.dhead = None
        if wants_head:  # every product but the one over no token writes all of it
            self.dhead = torch.empty_like(self.head) if num_tokens else torch.zeros_like(self.head)

    def go(self) -> "_Run":
        if self.tile.classes < self.settings.largest:
            self.by_classes()
        else:
            self.by_tokens()
        return self

    def by_tokens(self) -> None:
        """Take all classes of a tile of tokens after the other: no product twice."""
        halves = Halves(self.dhead, PART) if self.tile.sums_dhead else None
        for first in range(0, len(self.kept), self.tile.tokens):
            last = first + self.tile.tokens >= len(self.kept)
            chunk = _Chunk(self, self.kept[first : first + self.tile.tokens])
            logits = chunk.add(self.head, 0)
            chunk.write_losses()
            if self.dhead is None and self.dhidden is None:
                continue
            chunk.to_gradient_(logits, 0)
            for rows, piece in parts(logits) if self.dhead is not None else ():
                if halves:
                    halves.add_(rows, piece.t(), chunk.hidden, first=first == 0, last=last)
                else:
                    mm_(self.dhead[rows], piece.t(), chunk.hidden, add=first > 0)
            if self.dhidden is not None:
                chunk.write_dhidden(mm_(torch.empty_like(chunk.hidden), logits, self.head))

    def by_classes(self) -> None:
        """Take all tokens of a tile of classes after the other: for the sums, then for gradients.

        The way back begins with the logits that the way forth ended with, a whole tile of them:
        only the others are multiplied again.
        """
        chunk, classes = _Chunk(self, self.kept), self.head.shape[0]
        ends = range(classes, 0, -self.tile.classes)[::-1]
        tiles = [(max(0, end - self.tile.classes), end) for end in ends]
        for first, end in tiles:
            logits = chunk.add(self.head[first:end], first)
        chunk.write_losses()
        dhidden = torch.zeros_like(chunk.hidden, dtype=torch.float32)
        for first, end in reversed(tiles):
            head = self.head[first:end]
            if end != classes:
                logits = chunk.logits(head)
            chunk.to_gradient_(logits, first)
            for rows, piece in parts(logits, first):
                mm_(self.dhead[rows], piece.t(), chunk.hidden)
            if self.dhidden is not None:
                mm_(dhidden, logits, head, add=True)
        if self.dhidden is not None:
            chunk.write_dhidden(dhidden)


def parts(logits: Tensor, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Cut logits into parts of classes, each with the rows of the head that it belongs to."""
    for start in range(0, logits.shape[1], PART):
        part = logits[:, start : start + PART]
        yield slice(first + start, first + start + part.shape[1]), part


class _Chunk:
    """The tokens at ``kept``, and what their classes add up to."""

    def __init__(self, run: _Run, kept: Tensor) -> None:
        self.run, self.kept = run, kept
        self.hidden = run.hidden[kept]
        self.targets = run.targets[kept] - run.settings.first
        self.sums = no_sums(self.hidden)

    def logits(self, head: Tensor) -> Tensor:
        out = self.run.buffer[: len(self.kept), : head.shape[0]]
        return mm_(out, self.hidden, head.t())

    def add(self, head: Tensor, first: int) -> Tensor:
        logits = self.logits(head)
        smoothing = self.run.settings.label_smoothing
        self.run.kernels.add_(logits, self.targets, self.sums, first, smoothing)
        return logits

    def write_losses(self) -> None:
        settings = self.run.settings
        self.sums = merged(self.sums, settings.shard)
        highest, total_exp, total, target = self.sums.unbind(1)
        smoothing, lse = settings.label_smoothing, highest + total_exp.log()
        losses = lse - (1 - smoothing) * target + settings.z_loss * lse.square()
        losses -= smoothing * total / settings.num_classes
        self.run.losses.index_copy_(0, self.kept, losses.float())

    def to_gradient_(self, logits: Tensor, first: int) -> None:
        z_loss, smoothing, _, _, num_classes, *_ = self.run.settings
        denominators = torch.stack([self.sums[:, 0], self.sums[:, 1].log2()], dim=1).float()
        dlosses, settings = self.run.dlosses[self.kept], (num_classes, z_loss, smoothing)
        self.run.kernels.gradient_(logits, self.targets, denominators, dlosses, first, *settings)

    def write_dhidden(self, dhidden: Tensor) -> None:
        dhidden = summed(dhidden, self.run.settings.shard).to(self.hidden.dtype)
        self.run.dhidden.index_copy_(0, self.kept, dhidden)
