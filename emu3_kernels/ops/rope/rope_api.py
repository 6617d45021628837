"""Rotary positions. B batch, T tokens, H query heads, G key heads, K head width."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emu3_kernels.ops.rope import rope_reference as reference
from emu3_kernels.ops.rope.rotation import (
    check_heads,
    check_indices,
    check_inside,
    check_tables,
    check_written,
)
from emu3_kernels.runtime.autograd import mark_written, needs_gradient
from emu3_kernels.runtime.checks import check_no_gradient, copied, describe
from emu3_kernels.runtime.dispatch import choose, load

BACKENDS = load("rope", "cpu", "triton")


def rope_tables(
    num_positions: int, width: int, *, theta: float = 1e6, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Tabulate the cosine and sine of ``position * theta ** (-2i / width)`` for :func:`rope`.

    The angles are computed in float64: at position 131,071 a float32 angle is off by 0.004.

    Args:
        num_positions: rows of the tables, the longest sequence they serve.
        width: K, the head width; even.
        theta: the base of the wavelengths; 1e6 in Emu3.
        device: where the tables lie.

    Returns:
        cos and sin, each ``[num_positions, K/2]`` float32.
    """
    if width % 2:
        raise ValueError(f"rope_tables: width must be even, got {width}")
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    angles = torch.arange(num_positions, dtype=torch.float64, device=device)[:, None]
    angles = angles * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Rotate the halves of every head by the angle of its position.

    ``out = (first * cos - second * sin, second * cos + first * sin)``, first and second being the
    halves of a head (the layout of Llama). Computed in float32 (float64 for float64 inputs) and
    rounded once. Differentiable in q and k; the gradient is the inverse rotation, so only the
    tables and the positions are kept. q and k may be strided views of one packed projection: a
    copy is made only where K has no unit stride.

    From "RoFormer" (Su et al., arXiv 2104.09864).

    Args:
        q: ``[B, T, H, K]``, any floating dtype, K even.
        k: ``[B, T, G, K]``, dtype and device of ``q``.
        cos: ``[max_T, K/2]``, float32 (or float64), a constant: see :func:`rope_tables`.
        sin: same shape and dtype as ``cos``.
        positions: ``[B, T]`` int64 in ``[0, max_T)``; None is ``0 … T-1`` in every sequence.
        out: where the results go, for a call without a gradient: tensors like q and k, any strides
            but unit stride in K. ``(q, k)`` rotates in place; another tensor must not overlap them.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        ``out``, or new tensors for q and k, shapes and dtype of the old.
    """
    check_heads("rope", q, k=k)
    check_tables("rope", q, cos, sin)
    if out is not None:
        _check_out(q, k, out)
    if positions is not None:
        check_indices("rope", "positions", positions, q)
    elif q.shape[1] > cos.shape[0]:
        raise ValueError(
            f"rope: positions must lie in [0, {cos.shape[0]}), got 0 … {q.shape[1] - 1}"
        )
    chosen = choose("rope", BACKENDS, backend, q, k, cos, sin, positions)
    if chosen != "cpu" and positions is not None:  # the native kernel looks for itself
        check_inside("rope", "positions", positions, cos.shape[0])
    if chosen == "reference":
        results = reference.rope(q, k, cos, sin, positions)
        return results if out is None else copied(results, out)
    if out is not None or not needs_gradient(q, k):
        results = BACKENDS[chosen].rotate(q, k, cos, sin, positions, inverse=False, out=out)
        if out is not None:
            mark_written(*out)
        return results
    return _Rope.apply(q, k, cos, sin, positions, chosen)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, backend):
        ctx.save_for_backward(cos, sin, positions)
        ctx.backend = backend
        return BACKENDS[backend].rotate(q, k, cos, sin, positions, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        dq, dk = BACKENDS[ctx.backend].rotate(dq, dk, *ctx.saved_tensors, inverse=True)
        return dq, dk, None, None, None, None


def _check_out(q: Tensor, k: Tensor, out: tuple[Tensor, Tensor]) -> None:
    check_no_gradient("rope", q, k, *out)
    for name, x, written in zip(("q", "k"), (q, k), out, strict=True):
        if (written.shape, written.dtype, written.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"rope: out must be like q and k, got {describe(written)} for {name}, {describe(x)}"
            )
        check_written("rope", f"out for {name}", written)
