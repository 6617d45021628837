"""attention by PyTorch's own scaled_dot_product_attention, its gradient included."""

import torch.nn.functional as F
from torch import Tensor


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
        return "it knows no documents"
    if dropout_p > 0:
        return "its dropout draws random numbers of its own"
    if return_lse:
        return "it returns no lse"
    if causal and q.shape[1] != k.shape[1]:
        return "its causal mask aligns the first query with the first key"
    if k.shape[1] == 0:
        return "it is NaN where there is no key"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    document_ids: None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    if scale <= 0:  # PyTorch scales what its causal mask has made infinite
        q, scale = q * scale, 1.0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
