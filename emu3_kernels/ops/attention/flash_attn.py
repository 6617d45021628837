"""attention by flash-attn (FlashAttention-2), where it is installed: gradient and all."""

import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from torch import Tensor

from emu3_kernels.ops.attention.documents import starts_of

WIDEST = 256
INT32_MAX = torch.iinfo(torch.int32).max


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
        return f"flash-attn has no kernel for a {q.device.type} tensor"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn has no kernel for {q.dtype}"
    if q.shape[-1] > WIDEST:
        return f"flash-attn takes heads of {WIDEST} at most, got {q.shape[-1]}"
    if dropout_p > 0:
        return "flash-attn drops by random numbers of its own"
    if return_lse:
        return "flash-attn's lse has no gradient"
    if not (q.numel() and k.numel()):
        return "flash-attn takes no empty tensor"
    if max(_extent(x) for x in (q, k, v)) > INT32_MAX:
        return "flash-attn counts elements in 32 bits"
    if document_ids is not None and torch.compiler.is_compiling():
        return "flash-attn wants the documents counted, which is left to no graph"
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
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    settings = {
        "dropout_p": dropout_p,
        "softmax_scale": scale,
        "causal": causal,
        "deterministic": True,
    }
    if document_ids is None:
        return flash_attn_func(q, k, v, **settings)
    starts = starts_of(document_ids)
    longest = int(starts.diff().max())
    packed = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn_varlen_func(*packed, starts, starts, longest, longest, **settings)
    return out.unflatten(0, q.shape[:2])


def _extent(x: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
