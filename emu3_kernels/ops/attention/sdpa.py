"""attention and decode_attention by PyTorch's own scaled_dot_product_attention, with gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.ops.attention.optional import WARN, determinism, with_positive_scale
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.dispatch import Backend


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    document_ids: Tensor | None,
    dropout_p: float,
    return_lse: bool,
) -> str | None:
    if document_ids is not None:
        return "it takes no documents"
    if dropout_p > 0:
        return "its dropout draws random numbers of its own"
    if return_lse:
        return "it returns no lse"
    if causal and q.shape[1] != k.shape[1]:
        return "its causal mask aligns the first query with the first key"
    if k.shape[1] == 0:
        return "it is NaN where there is no key"
    if q.is_cuda and needs_gradient(q, k, v) and determinism() == WARN:
        return "PyTorch repeats its gradients on a GPU where warn_only is False"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    **_: object,
) -> Tensor:
    q, scale = with_positive_scale(q, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def why_not_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor | None,
    mask: Tensor | None,
) -> str | None:
    if page_table is not None:
        return "it reads no pages"
    if mask is not None:
        return "a mask of the new tokens is left to the others"
    if torch.compiler.is_compiling():
        return "it slices by lengths, which are unknown while a graph is traced"
    return None


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    mask: None,
    scale: float,
    page_table: None,
) -> Tensor:
    """Attend in every row of the batch by a call of its own."""
    out = torch.zeros_like(q)
    for row, length in enumerate(lengths.tolist()):
        num_queries = min(q.shape[1], length)  # the queries before these attend to no key
        if num_queries == 0:
            continue
        mask = None
        if num_queries > 1:
            mask = torch.ones(num_queries, length, dtype=torch.bool, device=q.device)
            mask = mask.tril(length - num_queries)
        visible = q[row, -num_queries:], k_cache[row, :length], v_cache[row, :length]
        heads = (x.transpose(0, 1)[None] for x in visible)
        attended = F.scaled_dot_product_attention(
            *heads, attn_mask=mask, scale=scale, enable_gqa=True
        )
        out[row, -num_queries:] = attended[0].transpose(0, 1)
    return out


BACKENDS = {
    "attention": Backend(why_not, function=attention),
    "decode_attention": Backend(why_not_decode, function=decode_attention),
}
