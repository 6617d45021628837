"""attention's kernels on the CPU: csrc/cpu/attention.cpp and attention_backward.cpp."""

import torch
from torch import Tensor

from emu3_kernels.ops.attention.spans import Dropout, Spans
from emu3_kernels.runtime import library

WIDEST = 256
"""Channels of a head that the kernels' buffers hold."""


MOST_SHARED = 1024
"""Query heads that may share one of keys."""


def why_not(q: Tensor, k: Tensor) -> str | None:
    """Say why the kernels cannot take heads such as those of ``q`` and ``k``; None if they can."""
    width, shared = q.shape[-1], q.shape[2] // k.shape[2]
    if width % 2 or width > WIDEST:
        return f"heads of an odd width or one above {WIDEST} are left to the reference, got {width}"
    if shared > MOST_SHARED:
        return f"more than {MOST_SHARED} query heads for one of keys are the reference's: {shared}"
    return library.why_not_cpu(q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    scale: float,
    dropout: Dropout | None,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v = (_dense(x) for x in (q, k, v))
    return torch.ops.emu3_kernels.attention(q, k, v, *_settings(spans, scale, dropout), wide)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    spans: Spans,
    scale: float,
    dropout: Dropout | None,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = (_dense(x) for x in (dout, q, k, v))
    lse, delta = lse.contiguous(), delta.contiguous()
    return torch.ops.emu3_kernels.attention_backward(
        dout, q, k, v, lse, delta, *_settings(spans, scale, dropout), wide
    )


def _dense(heads: Tensor) -> Tensor:
    """Give the channels of a head unit stride, by a copy only if they have another."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _settings(spans: Spans, scale: float, dropout: Dropout | None) -> tuple:
    first, end = (span.contiguous() for span in spans)
    return first, end, scale, *((0.0, None, None, None) if dropout is None else dropout)


if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::attention")
    def _(q, k, v, first, end, scale, dropout_p, seed, rows, columns, wide):
        batch, queries, heads, _ = q.shape
        out = q.new_empty(q.shape, dtype=torch.float32 if wide else q.dtype)
        return out, q.new_empty((batch, heads, queries), dtype=torch.float32)

    @torch.library.register_fake("emu3_kernels::attention_backward")
    def _(dout, q, k, v, lse, delta, first, end, scale, dropout_p, seed, rows, columns, wide):
        dtype = torch.float32 if wide else q.dtype
        return tuple(x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))
