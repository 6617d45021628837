"""Peers on a GPU: one small function for each library and op.

A peer function imports its library and returns a differentiable function of the op's inputs by
name. ``**rest`` takes the inputs that a peer has no argument for, at the op's defaults. Each peer
has its own copies of the inputs: some write over them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers import eager
from benchmarks.peers.cpu import UnavailableError
from emu3_kernels import Documents, attention

EPS = 1e-5
INSTALL = {
    "liger_kernel": "pip install liger-kernel==0.8.5",
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "xformers": "pip install xformers",
    "cut_cross_entropy": (
        'pip install "cut-cross-entropy @ git+https://github.com/apple/ml-cross-entropy.git"'
    ),
    "quack": "pip install quack-kernels",
    "torch": "pip install --upgrade torch",
}

Peer = Callable[..., Any]


def library(module: str) -> Any:
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        raise UnavailableError(f"{module} cannot be imported: {INSTALL[package]}") from error


def unweighted(weights: Tensor | None) -> None:
    if weights is not None:
        raise UnavailableError("it has no token weights")


def liger_rms_norm() -> Peer:
    norm = library("liger_kernel.transformers.functional").liger_rms_norm
    return lambda x, weight: norm(x, weight, EPS, in_place=False)


def liger_add_rms_norm() -> Peer:
    norm = library("liger_kernel.transformers.functional").liger_fused_add_rms_norm
    return lambda x, residual, weight: norm(x, residual, weight, EPS, in_place=False)


def liger_swiglu() -> Peer:
    swiglu = library("liger_kernel.transformers.functional").liger_swiglu
    return lambda gate, up: swiglu(gate, up)


def liger_rope() -> Peer:
    rope = library("liger_kernel.transformers.functional").liger_rope

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        """Rotate with the heads first, as Liger does."""
        tables = (t[None, : q.shape[1]].repeat(1, 1, 2) for t in (cos, sin))
        rotated = rope(q.transpose(1, 2), k.transpose(1, 2), *tables)
        return tuple(x.transpose(1, 2) for x in rotated)

    return call


def liger_cross_entropy() -> Peer:
    loss = library("liger_kernel.transformers.functional").liger_cross_entropy
    return lambda logits, targets: loss(logits, targets)


def liger_linear_cross_entropy() -> Peer:
    loss = library("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def call(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None):
        unweighted(weights)
        return loss(hidden, head, targets)

    return call


def cut_linear_cross_entropy() -> Peer:
    loss = library("cut_cross_entropy").linear_cross_entropy

    def call(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None):
        unweighted(weights)
        return loss(hidden, head, targets)

    return call


def torch_linear_cross_entropy() -> Peer:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy")

    def call(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None):
        unweighted(weights)
        return F.linear_cross_entropy(hidden, head, targets, ignore_index=-100)

    return call


def quack_rms_norm() -> Peer:
    norm = library("quack").rmsnorm
    return lambda x, weight: norm(x, weight, eps=EPS)


def quack_cross_entropy() -> Peer:
    loss = library("quack").cross_entropy
    return lambda logits, targets: loss(logits, targets, reduction="mean")


def without_documents(document_ids: Tensor | None) -> None:
    if document_ids is not None:
        raise UnavailableError("it takes no documents")


def sdpa(backend: SDPBackend) -> Peer:
    """Return PyTorch's attention by one of its own backends."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, document_ids: Tensor | None, **rest: Any
    ) -> Tensor:
        without_documents(document_ids)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    return call


def torch_flash() -> Peer:
    """Return PyTorch's FlashAttention behind our op; it searches the documents beforehand."""
    made: list[Documents] = []

    def call(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, document_ids: Tensor | None, **rest: Any
    ) -> Tensor:
        if document_ids is not None and not made:
            made.append(Documents(document_ids, causal=causal))
        documents = None if document_ids is None else made[0]
        settings = {"causal": causal, "document_ids": documents, "backend": "torch_flash"}
        return attention(q, k, v, **settings, **rest)

    return call


def flash_attention() -> Peer:
    attention = library("flash_attn").flash_attn_func

    def call(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, document_ids: Tensor | None, **rest: Any
    ) -> Tensor:
        without_documents(document_ids)
        return attention(q, k, v, causal=causal)

    return call


def xformers_attention() -> Peer:
    ops = library("xformers.ops")

    def call(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, document_ids: Tensor | None, **rest: Any
    ) -> Tensor:
        """Split the heads as ``[B, T, H_kv, H / H_kv, D]``; expand k and v without a copy."""
        without_documents(document_ids)
        kv_heads = k.shape[2]
        grouped = q.unflatten(2, (kv_heads, q.shape[2] // kv_heads))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, grouped.shape[3], -1) for x in (k, v))
        mask = ops.LowerTriangularMask() if causal else None
        return ops.memory_efficient_attention(grouped, k, v, attn_bias=mask).flatten(2, 3)

    return call


def channels_last_conv3d() -> Peer:
    """Return our op in plain PyTorch, its convolution on channels-last memory."""

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
        x, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, weight))
        return eager.causal_conv3d(x, weight, bias, **rest)

    return call


PEERS: Mapping[str, Mapping[str, Callable[[], Peer]]] = {
    "rms_norm": {"Liger": liger_rms_norm, "quack": quack_rms_norm},
    "add_rms_norm": {"Liger": liger_add_rms_norm},
    "swiglu": {"Liger": liger_swiglu},
    "rope": {"Liger": liger_rope},
    "cross_entropy": {"Liger": liger_cross_entropy, "quack": quack_cross_entropy},
    "linear_cross_entropy": {
        "torch": torch_linear_cross_entropy,
        "Liger": liger_linear_cross_entropy,
        "cut-cross-entropy": cut_linear_cross_entropy,
    },
    "attention": {
        "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "torch_flash": torch_flash,
        "flash-attn": flash_attention,
        "xformers": xformers_attention,
    },
    "causal_conv3d": {"cuDNN, channels last": channels_last_conv3d},
}
