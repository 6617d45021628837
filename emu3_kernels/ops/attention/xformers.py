"""attention by xformers, an optional library, with its gradient."""

import torch
from torch import Tensor

from emu3_kernels.ops.attention.key_ranges import Documents, packed
from emu3_kernels.ops.attention.optional import ERROR, determinism, failure, with_positive_scale
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.dispatch import Backend

MAX_HEAD_DIM = 256


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    document_ids: Tensor | None,
    dropout_p: float,
    return_lse: bool,
) -> str | None:
    if reason := failure(_import):
        return reason
    if q.device.type != "cuda":
        return f"xformers has no kernel for a {q.device.type} tensor"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype} is left to other backends"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"xformers takes a head_dim of {MAX_HEAD_DIM} at most, got {q.shape[-1]}"
    if dropout_p > 0:
        return "xformers draws its dropout from random numbers of its own"
    if return_lse:
        return "xformers' lse has no gradient"
    if needs_gradient(q, k, v) and determinism() != ERROR:
        return "xformers' gradients repeat only under torch.use_deterministic_algorithms(True)"
    if not (q.numel() and k.numel()):
        return "xformers takes no empty tensor"
    if causal and q.shape[1] > k.shape[1]:
        return "xformers leaves a query without a key undefined"
    if document_ids is not None and torch.compiler.is_compiling():
        return "xformers needs the number of documents, which is unknown while a graph is traced"
    return failure(_try, q.device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    document_ids: Tensor | Documents | None,
    scale: float,
    **_: object,
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    shape = q.shape
    q, scale = with_positive_scale(q, scale)
    tensors = (q, k, v)
    if document_ids is not None:
        tensors = (x.flatten(0, 1)[None] for x in tensors)
    queries, *shared = tensors
    num_kv_heads = k.shape[2]
    heads_per_kv_head = q.shape[2] // num_kv_heads
    # [B, T, KV, H/KV, K]: keys and values are expanded to their query heads without a copy.
    shared = (x.unsqueeze(3).expand(-1, -1, -1, heads_per_kv_head, -1) for x in shared)
    out = memory_efficient_attention(
        queries.unflatten(2, (num_kv_heads, heads_per_kv_head)),
        *shared,
        attn_bias=_mask(causal, document_ids),
        scale=scale,
    )
    return out.reshape(shape)


def _mask(causal: bool, document_ids: Tensor | Documents | None) -> object:
    from xformers.ops.fmha import attn_bias

    if document_ids is None:
        return attn_bias.LowerTriangularFromBottomRightMask() if causal else None
    starts, _ = packed(document_ids)
    lengths = starts.diff().tolist()
    blocks = attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=starts.device)
    return blocks.make_causal() if causal else blocks


def _import() -> None:
    from xformers.ops import memory_efficient_attention  # noqa: F401
    from xformers.ops.fmha import attn_bias  # noqa: F401


def _try(device: torch.device) -> None:
    x = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    attention(x, x, x, causal=True, document_ids=None, scale=1.0)


BACKENDS = {"attention": Backend(why_not, function=attention)}
