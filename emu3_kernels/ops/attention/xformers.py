"""attention by xformers, where it is installed: gradient and all."""

import torch
from torch import Tensor
from xformers.ops import memory_efficient_attention
from xformers.ops.fmha.attn_bias import (
    AttentionBias,
    BlockDiagonalMask,
    LowerTriangularFromBottomRightMask,
)

from emu3_kernels.ops.attention.documents import starts_of
from emu3_kernels.runtime.autograd import needs_gradient

WIDEST = 256


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    document_ids: Tensor | None,
    dropout_p: float,
    return_lse: bool,
) -> str | None:
    if q.device.type != "cuda":
        return f"xformers has no kernel for a {q.device.type} tensor"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype} is left to other backends"
    if q.shape[-1] > WIDEST:
        return f"xformers takes heads of {WIDEST} at most, got {q.shape[-1]}"
    if dropout_p > 0:
        return "xformers drops by random numbers of its own"
    if return_lse:
        return "xformers' lse has no gradient"
    if needs_gradient(q, k, v) and not torch.are_deterministic_algorithms_enabled():
        return "xformers' gradients repeat under torch.use_deterministic_algorithms alone"
    if not (q.numel() and k.numel()):
        return "xformers takes no empty tensor"
    if causal and q.shape[1] > k.shape[1]:
        return "xformers leaves a query that sees no key undefined"
    if document_ids is not None and torch.compiler.is_compiling():
        return "xformers wants the documents counted, which is left to no graph"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    document_ids: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    rows = (q, k, v)
    if document_ids is not None:
        rows = (x.flatten(0, 1)[None] for x in rows)
    queries, *shared = rows
    members = q.shape[2] // k.shape[2]
    # [B, T, G, H/G, K]: the keys of a group are the same memory for every head of it.
    shared = (x.unsqueeze(3).expand(-1, -1, -1, members, -1) for x in shared)
    out = memory_efficient_attention(
        queries.unflatten(2, (k.shape[2], members)),
        *shared,
        attn_bias=_mask(causal, document_ids),
        p=dropout_p,
        scale=scale,
    )
    return out.reshape(q.shape)


def _mask(causal: bool, document_ids: Tensor | None) -> AttentionBias | None:
    if document_ids is None:
        return LowerTriangularFromBottomRightMask() if causal else None
    lengths = starts_of(document_ids).diff().tolist()
    blocks = BlockDiagonalMask.from_seqlens(lengths, device=document_ids.device)
    return blocks.make_causal() if causal else blocks
