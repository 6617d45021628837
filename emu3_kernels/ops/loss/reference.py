"""The definition of both losses in plain PyTorch.

``[...]`` are the leading dimensions of the targets, V the number of classes, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.ops.loss.token_loss import reduce, token_weights
from emu3_kernels.ops.loss.vocab_shards import VocabShard, all_reduce_max, all_reduce_sum


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    compute = torch.promote_types(logits.dtype, torch.float32)
    weights = token_weights(targets, weights, ignore_index, compute)
    losses = token_losses(logits, targets, weights, z_loss, label_smoothing)
    return reduce(losses, weights, normalizer, reduction)


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    shard: VocabShard | None = None,
    return_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    compute = torch.promote_types(hidden.dtype, torch.float32)
    weights = token_weights(targets, weights, ignore_index, compute)
    hidden = hidden.masked_fill((weights == 0)[..., None], 0)
    settings = (weights, z_loss, label_smoothing)
    if shard is None or not shard.group:
        losses = token_losses(F.linear(hidden, head), targets, *settings)
    else:
        logits = F.linear(_CopyToGroup.apply(hidden, shard), head)
        losses = _vocab_parallel_token_losses(logits, targets, *settings, shard)
    loss = reduce(losses, weights, normalizer, reduction)
    return (loss, losses.detach()) if return_losses else loss


def token_losses(
    logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, label_smoothing: float
) -> Tensor:
    """Return the loss of each token before its weight, in the dtype of ``weights``.

    A token of weight 0 has loss 0, whatever its logits.
    """
    valid = weights != 0
    logits = logits.to(weights.dtype).masked_fill(~valid[..., None], 0)
    classes = torch.where(valid, targets, 0)
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, classes[..., None]).squeeze(-1)
    if label_smoothing:  # else a class at -infinity would turn 0 * infinity into NaN
        target = torch.lerp(target, logits.mean(-1), label_smoothing)
    if z_loss:  # likewise
        lse = lse + z_loss * lse.square()
    return torch.where(valid, lse - target, 0)


def _vocab_parallel_token_losses(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_loss: float,
    label_smoothing: float,
    shard: VocabShard,
) -> Tensor:
    """:func:`token_losses` of logits ``[..., V_r]``, the classes of this rank."""
    valid = weights != 0
    logits = logits.to(weights.dtype).masked_fill(~valid[..., None], 0)
    shard_lse = logits.logsumexp(-1)
    m = all_reduce_max(shard_lse.detach(), shard)
    lse = m + _SumOverGroup.apply((shard_lse - m).exp(), shard).log()
    classes = torch.where(valid, targets, 0) - shard.first
    elsewhere = (classes < 0) | (classes >= logits.shape[-1])
    classes = classes.masked_fill(elsewhere, logits.shape[-1])
    target = F.pad(logits, (0, 1)).gather(-1, classes[..., None]).squeeze(-1)
    target = _SumOverGroup.apply(target, shard)
    if label_smoothing:
        mean = _SumOverGroup.apply(logits.sum(-1), shard) / shard.num_classes
        target = torch.lerp(target, mean, label_smoothing)
    return torch.where(valid, lse - target + z_loss * lse.square(), 0)


class _CopyToGroup(torch.autograd.Function):
    """Identity forward, all-reduce backward: every rank computes with its own shard."""

    @staticmethod
    def forward(ctx, x, shard):
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return all_reduce_sum(dx, ctx.shard), None


class _SumOverGroup(torch.autograd.Function):
    """All-reduce forward, identity backward: all ranks compute the same from the sum."""

    @staticmethod
    def forward(ctx, part, shard):
        return all_reduce_sum(part, shard)

    @staticmethod
    def backward(ctx, dtotal):
        return dtotal, None
