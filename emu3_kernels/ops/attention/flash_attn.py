"""attention by flash-attn (FlashAttention-2), an optional library, with its gradient."""

import torch
from torch import Tensor

from emu3_kernels.ops.attention.key_ranges import document_starts
from emu3_kernels.ops.attention.optional import failure
from emu3_kernels.runtime.dispatch import Backend

MAX_HEAD_DIM = 256
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
    if reason := failure(_import):
        return reason
    if q.device.type != "cuda":
        return f"flash-attn has no kernel for a {q.device.type} tensor"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn has no kernel for {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"flash-attn takes a head_dim of {MAX_HEAD_DIM} at most, got {q.shape[-1]}"
    if dropout_p > 0:
        return "flash-attn draws its dropout from random numbers of its own"
    if return_lse:
        return "flash-attn's lse has no gradient"
    if not (q.numel() and k.numel()):
        return "flash-attn takes no empty tensor"
    if max(_extent(x) for x in (q, k, v)) > INT32_MAX:
        return "flash-attn counts elements in 32 bits"
    if document_ids is not None and torch.compiler.is_compiling():
        return "flash-attn needs the number of documents, which is unknown while a graph is traced"
    return failure(_try, q.device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    document_ids: Tensor | None,
    scale: float,
    **_: object,
) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    settings = {"softmax_scale": scale, "causal": causal, "deterministic": True}
    if document_ids is None:
        return flash_attn_func(q, k, v, **settings)
    starts = document_starts(document_ids)
    longest = int(starts.diff().max())
    packed = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn_varlen_func(*packed, starts, starts, longest, longest, **settings)
    return out.unflatten(0, q.shape[:2])


def _extent(x: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1


def _import() -> None:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: F401


def _try(device: torch.device) -> None:
    x = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    attention(x, x, x, causal=True, document_ids=None, scale=1.0)


BACKENDS = {"attention": Backend(why_not, function=attention)}
