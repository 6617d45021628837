"""The definition of ring_attention: the attention of the whole sequence, on every rank."""

import torch
import torch.distributed as dist
from torch import Tensor

from emu3_kernels.ops.attention.reference import attention
from emu3_kernels.ops.attention.ring.shards import shard_sequence, unshard_sequence


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, group: dist.ProcessGroup, **settings: object
) -> Tensor:
    """Gather q, k and v; ``settings`` are those of attention of the whole sequence."""
    compute = torch.promote_types(q.dtype, torch.float32)
    whole = (unshard_sequence(x.to(compute), group) for x in (q, k, v))
    return shard_sequence(attention(*whole, **settings), group).to(q.dtype)
