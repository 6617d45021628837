"""The definition of linear_cross_entropy in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.ops.loss import token_loss as _token_loss
from emu3_kernels.ops.loss.shards import Shard, largest_of, summed


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
    shard: Shard | None = None,
) -> Tensor:
    compute = torch.promote_types(hidden.dtype, torch.float32)
    weights = _token_loss.token_weights(targets, weights, ignore_index, compute)
    hidden = hidden.masked_fill((weights == 0)[..., None], 0)
    settings = (weights, z_loss, label_smoothing)
    if shard is None or not shard.group:
        losses = _token_loss.token_losses(F.linear(hidden, head), targets, *settings)
    else:
        logits = F.linear(_Entering.apply(hidden, shard), head)
        losses = _shared_token_losses(logits, targets, *settings, shard)
    return _token_loss.reduce(losses, weights, normalizer, reduction)


def _shared_token_losses(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_loss: float,
    label_smoothing: float,
    shard: Shard,
) -> Tensor:
    """``_token_loss.token_losses`` of logits ``[..., V_r]``, the classes of this rank."""
    kept = weights != 0
    logits = logits.to(weights.dtype).masked_fill(~kept[..., None], 0)
    mine = logits.logsumexp(-1)
    highest = largest_of(mine.detach(), shard)
    lse = highest + _Leaving.apply((mine - highest).exp(), shard).log()
    classes = torch.where(kept, targets, 0) - shard.first
    elsewhere = (classes < 0) | (classes >= logits.shape[-1])
    classes = classes.masked_fill(elsewhere, logits.shape[-1])
    target = F.pad(logits, (0, 1)).gather(-1, classes[..., None]).squeeze(-1)
    target = _Leaving.apply(target, shard)
    if label_smoothing:
        mean = _Leaving.apply(logits.sum(-1), shard) / shard.num_classes
        target = torch.lerp(target, mean, label_smoothing)
    return torch.where(kept, lse - target + z_loss * lse.square(), 0)


class _Entering(torch.autograd.Function):
    """What is the same on all ranks, before each does its own part: their gradients add up."""

    @staticmethod
    def forward(ctx, x, shard):
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return summed(dx, ctx.shard), None


class _Leaving(torch.autograd.Function):
    """The sum of the parts, after which all ranks do the same: so is the gradient of each."""

    @staticmethod
    def forward(ctx, part, shard):
        return summed(part, shard)

    @staticmethod
    def backward(ctx, dtotal):
        return dtotal, None
