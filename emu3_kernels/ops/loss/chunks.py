"""The loss of a head without its logits: a chunk of them at a time, in one buffer.

T tokens, N of them valid, D model width, V classes. The state of the online softmax of a token is
four numbers in float64: the largest logit m, the sum l of exponentials relative to it, the sum of
the logits and the logit of the target.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from emu3_kernels.ops.loss.chunking import DHEAD_CLASSES, aligned, chunking
from emu3_kernels.ops.loss.split_sum import SplitSum
from emu3_kernels.ops.loss.vocab_shards import (
    VocabShard,
    all_reduce_sum,
    initial_state,
    merge_states,
)
from emu3_kernels.runtime.gemm import mm_


class Kernels(NamedTuple):
    """What a backend does with a chunk of logits ``[N, C]``, the classes from ``first`` on."""

    add_: Callable[..., None]
    """``(logits, targets, state, first, label_smoothing)``: adds the chunk to ``state [N, 4]``."""
    gradient_: Callable[..., None]
    """``(logits, targets, softmax, dlosses, first, num_classes, z_loss, label_smoothing)``:
    overwrites the chunk with its gradient; ``softmax [N, 2]`` is m and log2(l) in float32."""


class Settings(NamedTuple):
    """Arguments of a call beside its tensors: plain numbers, since a custom op takes no object."""

    z_loss: float
    label_smoothing: float
    memory: int
    first: int
    num_classes: int
    largest: int
    group: str

    @property
    def shard(self) -> VocabShard:
        return VocabShard(self.first, self.num_classes, self.largest, self.group)


def as_ops(backend: str, kernels: Kernels) -> tuple[Callable, Callable]:
    """Make ``losses`` and ``gradients`` of a backend, over all T tokens; those of weight 0 cost 0.

    Both are opaque to ``torch.compile``: the number of valid tokens is known at run time alone.
    They may be Python custom ops because 50 microseconds a call are little beside the GEMMs. A
    gradient that is not needed is empty, and costs no GEMM.
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
    """One call: its inputs and outputs, computed in the order of its :class:`Chunking`."""

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
        self.valid = self.dlosses.nonzero().squeeze(1)
        num_tokens, width = len(self.valid), self.hidden.shape[1]
        kind = (width, self.hidden.dtype, settings.memory)
        self.chunking = chunking(num_tokens, settings.largest, *kind, wants_head=wants_head)
        classes = min(self.chunking.classes, self.head.shape[0])
        self.buffer = self.hidden.new_empty(min(self.chunking.tokens, num_tokens), aligned(classes))
        self.losses = torch.zeros_like(self.dlosses)
        self.dhidden = torch.zeros_like(self.hidden) if wants_hidden else None
        self.dhead = None
        if wants_head:  # every GEMM writes all of it, but without a valid token there is none
            self.dhead = torch.empty_like(self.head) if num_tokens else torch.zeros_like(self.head)

    def go(self) -> "_Run":
        if self.chunking.classes < self.settings.largest:
            self.by_classes()
        else:
            self.by_tokens()
        return self

    def by_tokens(self) -> None:
        """Take chunks of tokens, each with all classes: no GEMM runs twice."""
        size = self.chunking.tokens
        split_sum = SplitSum(self.dhead, DHEAD_CLASSES) if self.chunking.sums_dhead else None
        for first in range(0, len(self.valid), size):
            last = first + size >= len(self.valid)
            tokens = _Tokens(self, self.valid[first : first + size])
            logits = tokens.add(self.head, 0)
            tokens.write_losses()
            if self.dhead is None and self.dhidden is None:
                continue
            tokens.to_gradient_(logits, 0)
            for rows, dlogits in dhead_parts(logits) if self.dhead is not None else ():
                if split_sum:
                    split_sum.add_(rows, dlogits.t(), tokens.hidden, first=first == 0, last=last)
                else:
                    mm_(self.dhead[rows], dlogits.t(), tokens.hidden, add=first > 0)
            if self.dhidden is not None:
                tokens.write_dhidden(mm_(torch.empty_like(tokens.hidden), logits, self.head))

    def by_classes(self) -> None:
        """Take chunks of classes, each with all tokens: once for the state, once for gradients.

        The second pass begins with the logits that the first ended with, which are a whole chunk:
        the GEMM of all others runs again.
        """
        tokens, classes = _Tokens(self, self.valid), self.head.shape[0]
        ends = range(classes, 0, -self.chunking.classes)[::-1]
        chunks = [(max(0, end - self.chunking.classes), end) for end in ends]
        for first, end in chunks:
            logits = tokens.add(self.head[first:end], first)
        tokens.write_losses()
        dhidden = torch.zeros_like(tokens.hidden, dtype=torch.float32)
        for first, end in reversed(chunks):
            head = self.head[first:end]
            if end != classes:
                logits = tokens.logits(head)
            tokens.to_gradient_(logits, first)
            for rows, dlogits in dhead_parts(logits, first):
                mm_(self.dhead[rows], dlogits.t(), tokens.hidden)
            if self.dhidden is not None:
                mm_(dhidden, logits, head, add=True)
        if self.dhidden is not None:
            tokens.write_dhidden(dhidden)


def dhead_parts(dlogits: Tensor, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Split gradients of logits by classes: the rows of dhead, and the columns of one GEMM."""
    for start in range(0, dlogits.shape[1], DHEAD_CLASSES):
        part = dlogits[:, start : start + DHEAD_CLASSES]
        yield slice(first + start, first + start + part.shape[1]), part


class _Tokens:
    """The tokens at ``index``, and the state of their softmax."""

    def __init__(self, run: _Run, index: Tensor) -> None:
        self.run, self.index = run, index
        self.hidden = run.hidden[index]
        self.targets = run.targets[index] - run.settings.first
        self.state = initial_state(self.hidden)

    def logits(self, head: Tensor) -> Tensor:
        out = self.run.buffer[: len(self.index), : head.shape[0]]
        return mm_(out, self.hidden, head.t())

    def add(self, head: Tensor, first: int) -> Tensor:
        logits = self.logits(head)
        smoothing = self.run.settings.label_smoothing
        self.run.kernels.add_(logits, self.targets, self.state, first, smoothing)
        return logits

    def write_losses(self) -> None:
        settings = self.run.settings
        self.state = merge_states(self.state, settings.shard)
        m_i, l_i, total, target = self.state.unbind(1)
        smoothing, lse = settings.label_smoothing, m_i + l_i.log()
        losses = lse - (1 - smoothing) * target + settings.z_loss * lse.square()
        losses -= smoothing * total / settings.num_classes
        self.run.losses.index_copy_(0, self.index, losses.float())

    def to_gradient_(self, logits: Tensor, first: int) -> None:
        z_loss, smoothing, _, _, num_classes, *_ = self.run.settings
        softmax = torch.stack([self.state[:, 0], self.state[:, 1].log2()], dim=1).float()
        dlosses, settings = self.run.dlosses[self.index], (num_classes, z_loss, smoothing)
        self.run.kernels.gradient_(logits, self.targets, softmax, dlosses, first, *settings)

    def write_dhidden(self, dhidden: Tensor) -> None:
        dhidden = all_reduce_sum(dhidden, self.run.settings.shard).to(self.hidden.dtype)
        self.run.dhidden.index_copy_(0, self.index, dhidden)
