"""attention by flash-attn, an optional library, with its gradient.

FlashAttention-3, the package ``flash_attn_interface``, on sm_90 where it is installed and works;
else FlashAttention-2, the package ``flash_attn``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from emu3_kernels.ops.attention.key_ranges import Documents, packed
from emu3_kernels.ops.attention.optional import (
    INT32_MAX,
    aligned,
    extent,
    failure,
    with_positive_scale,
)
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
    if failure(_import_3) is not None and (reason := failure(_import_2)):
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
    if max(extent(x) for x in (q, k, v)) > INT32_MAX:
        return "flash-attn counts elements in 32 bits"
    if document_ids is not None and torch.compiler.is_compiling():
        return "flash-attn needs the number of documents, which is unknown while a graph is traced"
    return None if _has_3(q.device) else failure(_try_2, q.device)


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
    functions = _import_3() if _has_3(q.device) else _import_2()
    return _attend(functions, q, k, v, causal, document_ids, scale)


def _attend(
    functions: tuple[Callable, Callable],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    document_ids: Tensor | Documents | None,
    scale: float,
) -> Tensor:
    dense, varlen = functions
    q, scale = with_positive_scale(q, scale)
    q, k, v = (aligned(x) for x in (q, k, v))
    settings = {"softmax_scale": scale, "causal": causal, "deterministic": True}
    if document_ids is None:
        return _out(dense(q, k, v, **settings))
    starts, longest = packed(document_ids)
    tokens = (x.flatten(0, 1) for x in (q, k, v))
    out = varlen(*tokens, starts, starts, max_seqlen_q=longest, max_seqlen_k=longest, **settings)
    return _out(out).unflatten(0, q.shape[:2])


def _out(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Leave out the lse, which early versions of FlashAttention-3 return too."""
    return results[0] if isinstance(results, tuple) else results


def _import_2() -> tuple[Callable, Callable]:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return flash_attn_func, flash_attn_varlen_func


def _import_3() -> tuple[Callable, Callable]:
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    return flash_attn_func, flash_attn_varlen_func


def _has_3(device: torch.device) -> bool:
    return failure(_try_3, device) is None


def _try_2(device: torch.device) -> None:
    _try(_import_2(), device)


def _try_3(device: torch.device) -> None:
    functions = _import_3()
    if torch.cuda.get_device_capability(device)[0] != 9:
        raise RuntimeError("FlashAttention-3 has kernels for sm_90 alone")
    _try(functions, device)


def _try(functions: tuple[Callable, Callable], device: torch.device) -> None:
    """Run forward and backward of grouped heads, as training does."""
    q = torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    k = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    _attend(functions, q, k, k, True, None, 1.0).backward(q.detach())


BACKENDS = {"attention": Backend(why_not, function=attention)}
