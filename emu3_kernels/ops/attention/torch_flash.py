"""attention by the FlashAttention that PyTorch brings, also of documents, with its gradient.

FlashAttention-2, or what ``torch.nn.attention.activate_flash_attention_impl`` puts in its place. On
an H200, 342 TFLOP/s forward and 309 backward at 16,384 tokens of 32:8 heads of 128, measured.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.attention.key_ranges import Documents, packed
from emu3_kernels.ops.attention.optional import (
    INT32_MAX,
    WARN,
    aligned,
    determinism,
    extent,
    failure,
    with_positive_scale,
)
from emu3_kernels.runtime.autograd import needs_gradient
from emu3_kernels.runtime.dispatch import Backend

MAX_HEAD_DIM = 192
"""Beyond it some GPUs have no gradient."""

flash_attention = torch.ops.aten._flash_attention_forward


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    document_ids: Tensor | None,
    dropout_p: float,
    return_lse: bool,
) -> str | None:
    if not q.is_cuda or torch.version.hip is not None:
        return f"PyTorch's FlashAttention has no kernel for a {q.device.type} tensor here"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"PyTorch's FlashAttention has no kernel for {q.dtype}"
    if q.shape[3] > MAX_HEAD_DIM or q.shape[3] % 8:
        return (
            f"PyTorch's FlashAttention takes a head_dim of 8 to {MAX_HEAD_DIM} in steps of 8, "
            f"got {q.shape[3]}"
        )
    if dropout_p > 0:
        return "PyTorch's FlashAttention draws its dropout from random numbers of its own"
    if not (q.numel() and k.numel()):
        return "PyTorch's FlashAttention takes no empty tensor"
    if max(extent(x) for x in (q, k, v)) > INT32_MAX:
        return "PyTorch's FlashAttention is trusted with elements that 32 bits count"
    if return_lse and causal and q.shape[1] > k.shape[1]:
        return "PyTorch's FlashAttention returns an lse of inf for a query without a key"
    if needs_gradient(q, k, v):
        if return_lse:
            return "the lse of PyTorch's FlashAttention has no gradient"
        if determinism() == WARN:
            return "PyTorch's FlashAttention repeats its gradients where warn_only is False"
    if document_ids is not None and torch.compiler.is_compiling():
        return "it needs the number of documents, which is unknown while a graph is traced"
    return failure(_try, q.device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    document_ids: Tensor | Documents | None = None,
    scale: float,
    return_lse: bool = False,
    **_: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """KV heads are grouped inside the kernels, which read them in place."""
    shape = q.shape[:2]
    starts, longest = None, (q.shape[1], k.shape[1])
    q, scale = with_positive_scale(q, scale)
    heads = [aligned(x) for x in (q, k, v)]
    if document_ids is not None:
        starts, most = packed(document_ids)
        longest, heads = (most, most), [x.flatten(0, 1) for x in heads]
    settings = 0.0, causal, False
    out, lse, *_ = flash_attention(*heads, starts, starts, *longest, *settings, scale=scale)
    if starts is not None:  # [B * T, H, K] and [H, B * T]
        out, lse = out.unflatten(0, shape), lse.unflatten(1, shape).transpose(0, 1)
    return (out, lse) if return_lse else out


def _try(device: torch.device) -> None:
    """Run forward and backward of grouped heads, as training does."""
    q = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    k = torch.zeros(1, 64, 1, 64, dtype=torch.bfloat16, device=device)
    attention(q, k, k, causal=True, scale=1.0).backward(q.detach())


BACKENDS = {"attention": Backend(why_not, function=attention)}
