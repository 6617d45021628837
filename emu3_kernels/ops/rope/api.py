"""Rotary positions. B batch, T tokens, H query heads, G key heads, K head width."""

import torch
from torch import Tensor

from emu3_kernels._checks import check_floating, describe
from emu3_kernels._dispatch import choose, load
from emu3_kernels.ops.rope import reference

BACKENDS = load("rope", "native", "triton")


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
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        New tensors for q and k, shapes and dtype of the old.
    """
    _check_heads(q, k)
    _check_tables(q, cos, sin)
    _check_positions(q, cos, positions)
    chosen = choose("rope", BACKENDS, backend, q, k, cos, sin, positions)
    if chosen == "reference":
        return reference.rope(q, k, cos, sin, positions)
    return _Rope.apply(q, k, cos, sin, positions, chosen)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, backend):
        ctx.save_for_backward(cos, sin, positions)
        ctx.backend = backend
        return BACKENDS[backend].rotate(q, k, cos, sin, positions, inverse=False)

    @staticmethod
    def backward(ctx, dq, dk):
        dq, dk = BACKENDS[ctx.backend].rotate(dq, dk, *ctx.saved_tensors, inverse=True)
        return dq, dk, None, None, None, None


def _check_heads(q: Tensor, k: Tensor) -> None:
    check_floating("rope", q=q, k=k)
    alike = (q.dtype, q.device) == (k.dtype, k.device)
    fits = q.dim() == k.dim() == 4 and (*q.shape[:2], q.shape[3]) == (*k.shape[:2], k.shape[3])
    if not (alike and fits):
        raise ValueError(
            "rope: q must be [B, T, H, K] and k [B, T, G, K] of the same dtype and device, got "
            f"{describe(q)} and {describe(k)}"
        )
    if q.shape[3] % 2:
        raise ValueError(f"rope: the head width K must be even, got {q.shape[3]}")


def _check_tables(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rope: {name} must be float32 or float64, got {table.dtype}")
        if table.requires_grad:
            raise ValueError(f"rope: {name} is a constant, got a tensor that requires grad")
    fits = cos.dim() == 2 and cos.shape[1] == q.shape[3] // 2 and cos.device == q.device
    if not fits or (cos.shape, cos.dtype, cos.device) != (sin.shape, sin.dtype, sin.device):
        raise ValueError(
            f"rope: cos and sin must be alike, [max_T, {q.shape[3] // 2}] on {q.device}, got "
            f"{describe(cos)} and {describe(sin)}"
        )


def _check_positions(q: Tensor, cos: Tensor, positions: Tensor | None) -> None:
    """Look at values where that costs no synchronisation: in eager calls on a CPU."""
    if positions is None:
        if q.shape[1] > cos.shape[0]:
            raise ValueError(
                f"rope: positions must lie in [0, {cos.shape[0]}), got 0 … {q.shape[1] - 1}"
            )
        return
    if positions.dtype != torch.int64:
        raise TypeError(f"rope: positions must be int64, got {positions.dtype}")
    if positions.shape != q.shape[:2] or positions.device != q.device:
        raise ValueError(
            f"rope: positions must be {tuple(q.shape[:2])} on {q.device}, got {describe(positions)}"
        )
    inside = ((positions >= 0) & (positions < cos.shape[0])).all()
    must = f"rope: positions must lie in [0, {cos.shape[0]})"
    if torch.compiler.is_compiling() or positions.device.type != "cpu":
        torch._assert_async(inside, must)
    elif not inside:
        low, high = positions.aminmax()
        raise ValueError(f"{must}, got {low.item()} … {high.item()}")
