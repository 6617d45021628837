"""A decoder's training on pairs of a chosen and a rejected image, in the loop of pre-training.

Log-probabilities of images are sums of ``linear_cross_entropy(..., reduction="none")``, so that no
logits are kept. A rank holds a part of them; the loss takes the sums of all, and its derivatives by
these sums weight the rank's own part: the chain rule, without a message in backward.

B rows of a micro-batch, T tokens of a row, P pairs of a row, S = 2 P images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from emu3.data.pair_stream import PairStream
from emu3.data.pairs import files_of_pairs, load_header, weights_fingerprint
from emu3.model import Emu3, StepDropout
from emu3.train.layout import Batch, Layout
from emu3.train.parallel import backward_all, check_seeds, documents_of, forward_all, work_of
from emu3.train.preference_recipe import PreferenceRecipe, PreferenceSettings
from emu3.train.pretrain import Pretraining
from emu3.train.ranks import is_first
from emu3_kernels import preference_loss

_OF_PAIRS = "preference_loss", "margin", "pair_accuracy", "chosen_change", "rejected_change"
"""Means over pairs: the loss; ``beta`` times how far the chosen image is ahead, and the share of
the pairs where it is; changes of log-probabilities from the reference, in nats."""


class PairBatch(NamedTuple):
    """Packed rows of whole pairs: document 2 p is the chosen image of pair p, 2 p + 1 its other."""

    rows: Batch
    reference: Tensor
    """``[B, P, 2]`` float64, log-probabilities in nats."""

    @classmethod
    def of(cls, ids: Tensor, weights: Tensor, documents: Tensor, reference: Tensor) -> "PairBatch":
        return cls(Batch.of(ids, weights, documents), reference)

    @property
    def tokens(self) -> Tensor:
        return self.rows.tokens

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(self.rows.to(device), self.reference.to(device))

    def split(self, rows: int) -> list["PairBatch"]:
        parts = zip(self.rows.split(rows), self.reference.split(rows), strict=True)
        return [PairBatch(*part) for part in parts]

    @property
    def members(self) -> Tensor:
        """``[B, T, S]`` float64: 1 where a target is of an image, weighted."""
        images = torch.arange(2 * self.reference.shape[1], device=self.reference.device)
        return (self.rows.documents[..., None] == images) * self.rows.weights[..., None].double()


class StepPreference(NamedTuple):
    """The loss of a step, and what it is made of, of all ranks."""

    loss: Tensor
    """float32."""
    values: dict[str, Tensor]
    """float64: the mean next-token loss of chosen images, and means over pairs."""
    tokens: Tensor
    """float64, without padding."""
    pairs: Tensor
    """float64, of tokens and those that they attend to."""

    def metrics(self) -> dict[str, Tensor]:
        """Return the parts of the loss, and what the pairs have come to: NaN of no reference."""
        return self.values


def accumulate_preferences(
    model: Emu3,
    layout: Layout,
    batches: Sequence[PairBatch],
    settings: PreferenceSettings,
    *,
    seeds: Tensor | None = None,
) -> StepPreference:
    r"""Add up the gradients of a step's micro-batches, and return the loss of all ranks.

    ``mean over pairs of preference_loss(...) + ntp_weight * sum of nll / visual tokens``, the
    second of the chosen images; both means are of the whole step.

    The arguments are those of ``accumulate_gradients``, but for the batches.
    """
    check_seeds(model, seeds)
    normalizer = _normalizer(layout, batches)

    def objective(batch: PairBatch, dropout: StepDropout | None) -> tuple[Tensor, Tensor]:
        own = _log_probabilities(model, layout, batch, dropout)
        whole = _of_context(layout, own).requires_grad_()
        loss, part = _loss(model, layout, batch, whole, normalizer, settings)
        (gradient,) = torch.autograd.grad(loss, whole)
        return (own * gradient).sum(), part

    return _of_all_ranks(backward_all(model, layout, batches, objective, seeds))


def evaluate_preferences(
    model: Emu3, layout: Layout, batches: Sequence[PairBatch], settings: PreferenceSettings
) -> StepPreference:
    """Return the loss of all ranks without dropout, as of one step."""
    normalizer = _normalizer(layout, batches)

    def objective(batch: PairBatch) -> tuple[Tensor, Tensor]:
        whole = _of_context(layout, _log_probabilities(model, layout, batch, None))
        return _loss(model, layout, batch, whole, normalizer, settings)

    return _of_all_ranks(forward_all(model, layout, batches, objective))


def _log_probabilities(
    model: Emu3, layout: Layout, batch: PairBatch, dropout: StepDropout | None
) -> Tensor:
    """Sum over the tokens of this rank, ``[B, S]`` float64."""
    rows = batch.rows
    tokens, targets, weights, positions = (layout.cut(x) for x in rows[:4])
    documents = documents_of(layout, rows.documents)
    given = tokens, targets, weights, positions, documents
    losses = model.objective(*given, reduction="none", dropout=dropout)
    is_member = (layout.cut(batch.members) != 0).double()
    return -torch.einsum("bt,bts->bs", losses.double(), is_member)


def _of_context(layout: Layout, own: Tensor) -> Tensor:
    whole = own.detach().clone()
    if layout.settings.context > 1:
        dist.all_reduce(whole, group=layout.group("context"))
    return whole


def _loss(
    model: Emu3,
    layout: Layout,
    batch: PairBatch,
    whole: Tensor,
    normalizer: Tensor,
    settings: PreferenceSettings,
) -> tuple[Tensor, Tensor]:
    """Return the data rank's part of the loss of log-probabilities ``whole [B, S]``, and the same
    with the parts of the metrics, of this rank."""
    sums, counts = whole.unflatten(1, (-1, 2)), batch.members.sum(1).unflatten(1, (-1, 2))
    is_pair = counts[..., 0] > 0
    scale = 1 / counts.clamp(min=1) if settings.normalize == "mean" else torch.ones_like(counts)
    before = batch.reference.masked_fill(~is_pair[..., None], 0)
    chosen, rejected = (sums * scale).unbind(-1)
    reference = None
    if settings.needs_reference:
        reference = (before * scale)[..., 0] - (before * scale)[..., 1]
    how = {name: getattr(settings, name) for name in ("kind", "beta", "margin", "label_smoothing")}
    losses = is_pair * preference_loss(chosen, rejected, reference, **how)
    nll, (num_pairs, num_tokens) = -sums[..., 0].sum(), normalizer.unbind()
    loss = losses.sum() / num_pairs + settings.ntp_weight * nll / num_tokens
    with torch.no_grad():
        ahead = chosen - rejected if reference is None else chosen - rejected - reference
        changes = (sums - before).sum((0, 1))
        of_pairs = losses.sum(), settings.beta * ahead.sum(), (ahead > 0).sum(), *changes
        found = torch.stack([loss, nll / num_tokens, *(value / num_pairs for value in of_pairs)])
        # Each of the context ranks has the whole of these, and a part of the work.
        found = found * (layout.rank("context") == 0)
        work = work_of(model, *(layout.cut(x) for x in (batch.tokens, batch.rows.positions)))
    return loss, torch.cat([found, torch.stack(work)])


def _normalizer(layout: Layout, batches: Sequence[PairBatch]) -> Tensor:
    """``[2]`` float64: pairs, and visual tokens of chosen images, of all ranks in a step."""
    counts = [batch.members.sum(1)[:, 0::2] for batch in batches]
    own = torch.stack([torch.stack([(c > 0).double().sum(), c.sum()]) for c in counts]).sum(0)
    total = own * (layout.rank("context") == layout.rank("tensor") == 0)
    dist.all_reduce(total)
    return total


def _of_all_ranks(total: Tensor) -> StepPreference:
    values = dict(zip(("ntp_loss", *_OF_PAIRS), total[1:-2].unbind(), strict=True))
    return StepPreference(total[0].float(), values, *total[-2:].unbind())


class PreferenceTraining(Pretraining):
    """What is trained on pairs, on this rank, and what it reads."""

    STREAM = PairStream
    batch_of = staticmethod(PairBatch.of)
    recipe: PreferenceRecipe

    def check(self) -> None:
        """Raise unless the reference is of the weights that the run starts from.

        The first rank alone reads them.
        """
        if not (self.recipe.preference.needs_reference and is_first()):
            return
        start, validation = self.recipe.train.start, self.recipe.evaluation.pairs
        if start is None:
            raise ValueError(
                "train: train.start must name the weights of the reference, which are tuned"
            )
        weights = weights_fingerprint(start)
        others = [] if validation is None else files_of_pairs(validation)
        for path in (*self.stream.rows.folders, *others):
            found = load_header(path).decoder
            if found != weights:
                got = "none" if found is None else f"those of {found}"
                raise ValueError(
                    f"train: {path} must have log-probabilities of the reference {start} "
                    f"({weights}), got {got}: give it to emu3 prefer --model"
                )

    def accumulate(self, batches: Sequence[PairBatch], seeds: Tensor | None) -> StepPreference:
        settings = self.recipe.preference
        return accumulate_preferences(self.model, self.layout, batches, settings, seeds=seeds)

    def forward(self, batches: Sequence[PairBatch]) -> StepPreference:
        return evaluate_preferences(self.model, self.layout, batches, self.recipe.preference)
