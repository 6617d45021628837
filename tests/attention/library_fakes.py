"""Fakes of libraries whose attention needs a GPU, with the signatures of their functions.

These were recorded from flash_attn/flash_attn_interface.py (commit 0053002), from xformers/ops/fmha
/__init__.py (00afc12) and attn_bias.py (deebdef) there and from torch's native_functions.yaml. They
compute by the definition, so that tests hold the arguments that the adapters pass.
"""

import torch

from emu3_kernels.ops.attention import cudnn, flash_attn, reference, torch_flash, xformers

ADAPTERS = {"flash_attn": flash_attn, "xformers": xformers}
"""Of packages that may not be installed."""
ALL = ADAPTERS | {"cudnn": cudnn, "torch_flash": torch_flash}
TRY = {"flash_attn": "_try_2", "xformers": "_try", "cudnn": "_try", "torch_flash": "_try"}
"""The tiny call of each adapter."""


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert deterministic
    assert dropout_p == 0
    assert softmax_scale > 0
    return reference.attention(q, k, v, causal=causal, scale=softmax_scale)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q)
    assert (cu_seqlens_q.diff().max(), max_seqlen_k) == (max_seqlen_q, max_seqlen_q)
    lengths = cu_seqlens_q.diff().tolist()
    parts = zip(*(x[None].split(lengths, dim=1) for x in (q, k, v)), strict=True)
    rest = {"softmax_scale": softmax_scale, "causal": causal, "deterministic": deterministic}
    return torch.cat([flash_attn_func(*part, **rest) for part in parts], dim=1)[0]


class LowerTriangularFromBottomRightMask:
    pass


class BlockDiagonalMask:
    causal = False

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        mask = cls()
        mask.lengths = q_seqlen
        return mask

    def make_causal(self):
        self.causal = True
        return self


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    """The query heads of a KV head are a dimension of their own, and share its keys."""
    assert p == 0
    assert scale > 0
    assert key.shape[3] == 1 or key.stride(3) == value.stride(3) == 0
    if isinstance(attn_bias, BlockDiagonalMask):
        assert query.shape[0] == 1
        causal, lengths = attn_bias.causal, attn_bias.lengths
    else:
        causal, lengths = attn_bias is not None, None
    parts = [x.flatten(2, 3).split(lengths or x.shape[1], dim=1) for x in (query, key, value)]
    outs = [
        reference.attention(*part, causal=causal, scale=scale) for part in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=1).view(query.shape)


def cudnn_attention(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
    return_debug_mask=False, *, scale=None,
):  # fmt: skip
    """As declared in torch's native_functions.yaml; heads are [B, H, T, K], and grouped."""
    assert (attn_bias, dropout_p, return_debug_mask) == (None, 0, False)
    assert scale > 0
    assert compute_log_sumexp or not torch.is_grad_enabled() or not query.requires_grad
    assert all(x.stride(3) == 1 for x in (query, key, value))
    heads = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = reference.attention(*heads, causal=is_causal, scale=scale, return_lse=True)
    return out.transpose(1, 2), lse[..., None]


def torch_flash_attention(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
    *, scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
):  # fmt: skip
    """As declared in torch's native_functions.yaml; heads are [B, T, H, K], or [total, H, K].

    In float64, and the lse has no gradient.
    """
    assert (dropout_p, return_debug_mask) == (0, False)
    assert scale > 0
    heads, packed = (query, key, value), cum_seq_q is not None
    assert all(x.stride(-1) == 1 for x in heads)
    lengths = [query.shape[1], key.shape[1]]
    if packed:
        assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
        heads = [x[None] for x in heads]
        lengths = [c.diff().tolist() for c in (cum_seq_q, cum_seq_k)]
        assert [sum(n) for n in lengths] == [len(query), len(key)]
    assert (max_q, max_k) == tuple(max(n) if packed else n for n in lengths)
    lengths.append(lengths[1])
    split = (x.double().split(n, 1) for x, n in zip(heads, lengths, strict=True))
    settings = {"causal": is_causal, "scale": scale, "return_lse": True}
    parts = (reference.attention(*part, **settings) for part in zip(*split, strict=True))
    outs, lses = zip(*parts, strict=True)
    out, lse = torch.cat(outs, 1).to(query.dtype), torch.cat(lses, 2).detach().float()
    return *((out[0], lse[0]) if packed else (out, lse)), None, None, None
