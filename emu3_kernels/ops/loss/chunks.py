"""The loss of a head without its logits, a chunk of them at a time: what CPU and GPU share.

T tokens, N of them valid, D model width, V classes. The state of the online softmax of a token is
four numbers in float64: the largest logit m, the sum l of exponentials relative to it, the sum of
the logits and the logit of the target.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from emu3_kernels.ops.loss.vocab_shards import (
    VocabShard,
    all_reduce_sum,
    initial_state,
    merge_states,
)


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
    memory: int | None
    first: int
    num_classes: int
    largest: int
    group: str

    @property
    def shard(self) -> VocabShard:
        return VocabShard(self.first, self.num_classes, self.largest, self.group)


def as_ops(backend: str, kernels: Kernels, run: type["Run"]) -> tuple[Callable, Callable]:
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
        rows: Tensor | None,
        z_loss: float,
        label_smoothing: float,
        memory: int | None,
        first: int,
        num_classes: int,
        largest: int,
        group: str,
    ) -> Tensor:
        settings = Settings(z_loss, label_smoothing, memory, first, num_classes, largest, group)
        done = run(kernels, (hidden, head, targets, weights, rows), settings)
        done.go()
        return done.losses

    @torch.library.custom_op(name.format("gradients"), mutates_args=())
    def gradients(
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        dlosses: Tensor,
        rows: Tensor | None,
        wants_hidden: bool,
        wants_head: bool,
        z_loss: float,
        label_smoothing: float,
        memory: int | None,
        first: int,
        num_classes: int,
        largest: int,
        group: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        settings = Settings(z_loss, label_smoothing, memory, first, num_classes, largest, group)
        wants = {"wants_hidden": wants_hidden, "wants_head": wants_head}
        done = run(kernels, (hidden, head, targets, dlosses, rows), settings, **wants)
        done.go()
        dhidden = hidden.new_empty(0) if done.dhidden is None else done.dhidden
        dhead = head.new_empty(0) if done.dhead is None else done.dhead
        return done.losses, dhidden, dhead

    losses.register_fake(
        lambda hidden, head, targets, weights, *_: weights.new_empty(weights.shape)
    )
    gradients.register_fake(_fake_gradients)
    return losses, gradients


def _fake_gradients(hidden, head, targets, dlosses, rows, wants_hidden, wants_head, *_):
    dhidden = hidden.new_empty(hidden.shape if wants_hidden else (0,))
    dhead = head.new_empty(head.shape if wants_head else (0,))
    return dlosses.new_empty(dlosses.shape), dhidden, dhead


class Run:
    """One call: its inputs and outputs. A subclass computes them, chunk by chunk, in ``go``."""

    def __init__(
        self,
        kernels: Kernels,
        tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
        settings: Settings,
        *,
        wants_hidden: bool = False,
        wants_head: bool = False,
    ) -> None:
        self.kernels, self.settings = kernels, settings
        self.hidden, self.head, self.targets, self.dlosses, rows = tokens
        self.has_rows = rows is not None
        self.valid = rows if self.has_rows else self.dlosses.nonzero().squeeze(1)
        self.losses = torch.zeros_like(self.dlosses)
        self.dhidden = torch.zeros_like(self.hidden) if wants_hidden else None
        self.dhead = None
        if wants_head:  # every GEMM writes all of it, but without a valid token there is none
            some = len(self.valid) > 0
            self.dhead = torch.empty_like(self.head) if some else torch.zeros_like(self.head)

    def go(self) -> None:
        raise NotImplementedError


class Tokens:
    """The tokens at ``index``, and the state of their softmax."""

    def __init__(self, run: Run, index: Tensor) -> None:
        self.run, self.index = run, index
        self.are_all = len(index) == len(run.hidden) and not run.has_rows
        self.hidden = run.hidden if self.are_all else run.hidden[index]
        self.targets = run.targets[index] - run.settings.first
        self.dlosses = run.dlosses[index]
        self.state = initial_state(self.hidden)
        if run.has_rows:  # of which some may be ignored, whatever their hidden states
            self.hidden.masked_fill_((self.dlosses == 0)[:, None], 0)

    def add(self, logits: Tensor, first: int) -> None:
        """Add the logits of the classes from ``first`` on to the state."""
        smoothing = self.run.settings.label_smoothing
        self.run.kernels.add_(logits, self.targets, self.state, first, smoothing)

    def write_losses(self) -> None:
        """Merge the states of a group, write the losses, and keep m and log2(l)."""
        settings = self.run.settings
        m_i, l_i, total, target = merge_states(self.state, settings.shard).unbind(1)
        smoothing, lse = settings.label_smoothing, m_i + l_i.log()
        losses = lse - (1 - smoothing) * target + settings.z_loss * lse.square()
        losses -= smoothing * total / settings.num_classes
        if self.run.has_rows:
            losses = torch.where(self.dlosses != 0, losses, 0)
        self.run.losses.index_copy_(0, self.index, losses.float())
        self.softmax = torch.stack([m_i, l_i.log2()], dim=1).float()

    def to_gradient_(self, logits: Tensor, first: int) -> None:
        """Overwrite logits by their gradient."""
        z_loss, smoothing, _, _, num_classes, *_ = self.run.settings
        given = (self.targets, self.softmax, self.dlosses, first, num_classes, z_loss, smoothing)
        self.run.kernels.gradient_(logits, *given)

    def write_dhidden(self, dhidden: Tensor, block: slice = slice(None)) -> None:
        """Write the gradient of all tokens here, or of a ``block`` of them."""
        dhidden = all_reduce_sum(dhidden, self.run.settings.shard)
        if self.are_all:
            self.run.dhidden[block].copy_(dhidden)
        else:
            self.run.dhidden.index_copy_(0, self.index[block], dhidden.to(self.hidden.dtype))
