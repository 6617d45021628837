"""The loss of a head without its logits: blocks of the vocabulary through one buffer.

N tokens that count, D model width, V classes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MIN_BLOCK = 1024
"""Classes in a block at the least, whatever the memory: a thinner product wastes the processor."""


class Kernels(NamedTuple):
    """What a backend does with a block of logits ``[N, block]``, the classes from ``first`` on."""

    add_: Callable[..., None]
    """``(logits, targets, sums, first, label_smoothing)``: adds it to ``sums``: ``[N, 4]`` in
    float64, the largest logit, sum of exponentials over its own, sum and target logit."""
    gradient_: Callable[..., None]
    """``(logits, targets, denominators, dlosses, first, num_classes, z_loss, label_smoothing)``:
    overwrites it with its gradient; ``denominators`` ``[N, 2]`` are the largest logit and the
    logarithm to base 2 of the sum."""


class Settings(NamedTuple):
    z_loss: float
    label_smoothing: float
    memory: int


def as_ops(backend: str, kernels: Kernels) -> tuple[Callable, Callable]:
    """Make ``losses`` and ``gradients`` of a backend: over all T tokens, those of weight 0 dropped.

    Both are opaque to ``torch.compile``: how many tokens count is known when they run. They may be
    Python ops because 50 microseconds a call are nothing beside their matrix products.
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
    ) -> Tensor:
        kept = weights.nonzero().squeeze(1)
        settings = Settings(z_loss, label_smoothing, memory)
        counted = counted_losses(kernels, hidden[kept], head, targets[kept], settings)
        return weights.new_zeros(weights.shape).index_copy_(0, kept, counted)

    @torch.library.custom_op(name.format("gradients"), mutates_args=())
    def gradients(
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        dlosses: Tensor,
        z_loss: float,
        label_smoothing: float,
        memory: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept = dlosses.nonzero().squeeze(1)
        settings = Settings(z_loss, label_smoothing, memory)
        counted, dkept, dhead = counted_gradients(
            kernels, hidden[kept], head, targets[kept], dlosses[kept], settings
        )
        dhidden = hidden.new_zeros(hidden.shape).index_copy_(0, kept, dkept)
        return dlosses.new_zeros(dlosses.shape).index_copy_(0, kept, counted), dhidden, dhead

    losses.register_fake(_fake_losses)
    gradients.register_fake(_fake_gradients)
    return losses, gradients


def _fake_losses(hidden, head, targets, weights, z_loss, label_smoothing, memory):
    return weights.new_empty(weights.shape)


def _fake_gradients(hidden, head, targets, dlosses, z_loss, label_smoothing, memory):
    return dlosses.new_empty(dlosses.shape), hidden.new_empty(hidden.shape), torch.empty_like(head)


def counted_losses(
    kernels: Kernels, hidden: Tensor, head: Tensor, targets: Tensor, settings: Settings
) -> Tensor:
    """Return the losses ``[N]`` in float32: every block is multiplied once."""
    return _Pass(kernels, hidden, head, targets, settings).losses()


def counted_gradients(
    kernels: Kernels,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    dlosses: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, and dhidden and dhead of ``sum(dlosses * losses)``.

    A vocabulary that fits the memory is multiplied once, otherwise each block a second time:
    its gradient needs the sum over all of them. dhead is one product over all tokens, rounded
    once; dhidden adds its blocks in float32.
    """
    run = _Pass(kernels, hidden, head, targets, settings)
    return run.losses(), *run.gradients(dlosses)


class _Pass:
    def __init__(self, kernels, hidden, head, targets, settings):
        self.kernels, self.settings = kernels, settings
        self.hidden, self.head, self.targets = hidden, head, targets
        self.block = block_size(hidden, head, settings.memory)
        self.buffer = hidden.new_empty(hidden.shape[0], self.block)
        self.sums = hidden.new_empty(hidden.shape[0], 4, dtype=torch.float64)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, self.head.shape[0], self.block):
            yield first, self.head[first : first + self.block]

    def logits(self, head: Tensor) -> Tensor:
        return torch.mm(self.hidden, head.t(), out=self.buffer[:, : head.shape[0]])

    def losses(self) -> Tensor:
        smoothing = self.settings.label_smoothing
        for first, head in self.blocks():
            self.kernels.add_(self.logits(head), self.targets, self.sums, first, smoothing)
        highest, total_exp, total, target = self.sums.unbind(1)
        lse = highest + total_exp.log()
        losses = lse - (1 - smoothing) * target + self.settings.z_loss * lse.square()
        return (losses - smoothing * total / self.head.shape[0]).float()

    def gradients(self, dlosses: Tensor) -> tuple[Tensor, Tensor]:
        num_classes, z_loss, smoothing = self.head.shape[0], *self.settings[:2]
        denominators = torch.stack([self.sums[:, 0], self.sums[:, 1].log2()], dim=1).float()
        settings = (num_classes, z_loss, smoothing)
        once = self.block >= num_classes  # then the buffer still holds the logits
        dhead = torch.empty_like(self.head)
        dhidden = self.hidden.new_zeros(self.hidden.shape, dtype=torch.float32)
        for first, head in self.blocks():
            logits = self.buffer[:, :num_classes] if once else self.logits(head)
            self.kernels.gradient_(logits, self.targets, denominators, dlosses, first, *settings)
            torch.mm(logits.t(), self.hidden, out=dhead[first : first + self.block])
            dhidden += torch.mm(logits, head)
        return dhidden.to(self.hidden.dtype), dhead


def block_size(hidden: Tensor, head: Tensor, memory: int) -> int:
    """Return how many classes a block holds: equal blocks of whole cache lines within ``memory``.

    Beside the buffer stand the newest part of dhidden and, where that is not the gradient
    itself, its sum in float32.
    """
    (num_tokens, width), num_classes = hidden.shape, head.shape[0]
    total = 0 if hidden.dtype == torch.float32 else 4
    left = memory - num_tokens * width * (hidden.element_size() + total)
    fits = left // (max(num_tokens, 1) * hidden.element_size()) // 64 * 64
    num_blocks = -(-num_classes // max(fits, MIN_BLOCK))
    return -(-num_classes // (64 * num_blocks)) * 64
