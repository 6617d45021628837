"""Rotary position embedding, alone or with the write into a KV cache.

B batch, T tokens, S slots of the cache, H query heads, KV key/value heads, K head_dim. The kernels
of a backend:

    rope: forward(q, k, cos, sin, positions, inverse=False, out=None) -> rotated q, rotated k
    rope_append: forward(q, k, v, cos, sin, key_cache, value_cache, slots, positions) -> rotated q

``backward`` of rope is the same function: the vjp of a rotation is its inverse.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.rope import reference
from emu3_kernels.runtime.autograd import mark_written, needs_gradient, once_differentiable
from emu3_kernels.runtime.checks import (
    check_grouped_heads,
    check_no_gradient,
    check_values,
    copied,
    describe,
)
from emu3_kernels.runtime.dispatch import Backends

ROPE = Backends("rope", __package__, reference.rope, cpu=("cpu",), cuda=("triton",))
ROPE_APPEND = Backends(
    "rope_append", __package__, reference.rope_append, cpu=("cpu",), cuda=("triton",)
)
TABLE_DTYPES = (torch.float32, torch.float64)


def rope_tables(
    num_positions: int, width: int, *, theta: float = 1e6, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Tabulate the cosine and sine of ``position * theta ** (-2i / width)`` for :func:`rope`.

    The angles are computed in float64: at position 131,071 a float32 angle is off by 0.004.

    Args:
        num_positions: rows of the tables, the longest sequence length.
        width: K, the head_dim; even.
        theta: base of the wavelengths; 1e6 in Emu3.
        device: of the tables.

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

    ``out = (first * cos - second * sin, second * cos + first * sin)``, where first and second are
    the halves of a head (the layout of Llama). Computed in float32 (float64 for float64 inputs)
    and rounded once. Differentiable in q and k; the gradient is the inverse rotation, so only the
    tables and the positions are saved. q and k may be strided views of one packed projection: a
    copy is made only if K has no unit stride.

    From "RoFormer" (Su et al., arXiv 2104.09864).

    Args:
        q: ``[B, T, H, K]``, any floating dtype, K even.
        k: ``[B, T, KV, K]``, dtype and device of ``q``.
        cos: ``[max_T, K/2]``, float32 (or float64), a constant: see :func:`rope_tables`.
        sin: same shape and dtype as ``cos``.
        positions: ``[B, T]`` int64 in ``[0, max_T)``; None is ``0 … T-1`` in every sequence.
        out: tensors for the results, for a call without a gradient: like q and k, any strides but
            unit stride in K. ``(q, k)`` rotates in place; another tensor must not overlap them.
        backend: ``"cpu"``, ``"triton"``, ``"reference"``, or None for the first that fits.

    Returns:
        The rotated q and k, in their shapes and dtype: ``out``, or new tensors.
    """
    check_grouped_heads("rope", "q must be [B, T, H, K] and k [B, T, KV, K]", q, k, multiple=False)
    _check_tables("rope", q, cos, sin)
    if out is not None:
        _check_out(q, k, out)
    if positions is not None:
        _check_indices("rope", "positions", positions, q)
    elif q.shape[1] > cos.shape[0]:
        raise ValueError(
            f"rope: positions must lie in [0, {cos.shape[0]}), got 0 … {q.shape[1] - 1}"
        )
    chosen = ROPE.choose(backend, q, cos)
    if positions is not None and chosen is not ROPE["cpu"]:  # its C++ checks them itself
        _check_range("rope", "positions", positions, cos.shape[0])
    if chosen.function is not None:
        results = chosen.function(q, k, cos, sin, positions)
        return results if out is None else copied(results, out)
    if out is not None:
        chosen.forward(q, k, cos, sin, positions, out=out)
        mark_written(*out)
        return out
    if needs_gradient(q, k):
        return _Rope.apply(q, k, cos, sin, positions, chosen)
    return chosen.forward(q, k, cos, sin, positions)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, backend):
        ctx.save_for_backward(cos, sin, positions)
        ctx.backend = backend
        return backend.forward(q, k, cos, sin, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        dq, dk = ctx.backend.backward(dq, dk, *ctx.saved_tensors, inverse=True)
        return dq, dk, None, None, None, None


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    positions: Tensor | None = None,
    *,
    check_indices: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""Rotate q and k as :func:`emu3_kernels.rope` does; write k and v into their caches.

    ``key_cache[b, slots[b, t]] = rotated k[b, t]`` and ``value_cache[b, slots[b, t]] = v[b, t]``:
    **both caches are written in place**, no other slot is touched. Computed in float32 (float64
    for float64 inputs) and rounded once. For inference: there is no gradient. q, k and v may be
    strided views of one packed projection, the caches any views with unit stride in K.

    Rows of one length share their slots: ``torch.arange(start, start + T).expand(B, T)``. Pages of
    one pool are the slots of a single row: ``B = 1``, ``key_cache.view(1, pages * page, KV, K)``.

    Args:
        q: ``[B, T, H, K]``, any floating dtype, K even.
        k: ``[B, T, KV, K]``, dtype and device of ``q``.
        v: same as ``k``.
        cos: ``[max_T, K/2]``, float32 (or float64): see :func:`emu3_kernels.rope_tables`.
        sin: same shape and dtype as ``cos``.
        key_cache: ``[B, S, KV, K]``, dtype and device of ``q``.
        value_cache: same shape as ``key_cache``.
        slots: ``[B, T]`` int64 in ``[0, S)``, distinct within a row.
        positions: ``[B, T]`` int64 in ``[0, max_T)``; None is ``slots``, for a row that starts at
            slot 0.
        check_indices: check the values of ``slots`` and ``positions``, which takes four small
            kernels on a GPU. With False the caller guarantees them; a wrong one then writes outside
            the cache. ``"cpu"`` always checks them, at no cost.
        backend: ``"cpu"``, ``"triton"``, ``"reference"``, or None for the first that fits.

    Returns:
        The rotated q, a new tensor.
    """
    layout = "q must be [B, T, H, K] and k [B, T, KV, K]"
    check_grouped_heads("rope_append", layout, q, k, multiple=False)
    _check_tables("rope_append", q, cos, sin)
    _check_caches(q, k, v, key_cache, value_cache)
    _check_indices("rope_append", "slots", slots, q)
    if positions is not None:
        _check_indices("rope_append", "positions", positions, q)
    chosen = ROPE_APPEND.choose(backend, q, cos)
    if check_indices and chosen is not ROPE_APPEND["cpu"]:  # its C++ checks them itself
        _check_places(slots, positions, key_cache.shape[1], cos.shape[0])
    if positions is None:
        positions = slots
    if chosen.function is not None:
        return chosen.function(q, k, v, cos, sin, key_cache, value_cache, slots, positions)
    rotated = chosen.forward(q, k, v, cos, sin, key_cache, value_cache, slots, positions)
    mark_written(key_cache, value_cache)
    return rotated


def _check_tables(op: str, q: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise unless K is even and both tables are constants ``[max_T, K/2]`` on q's device."""
    head_dim, shape, dtype, device = q.shape[3], cos.shape, cos.dtype, q.device
    if head_dim % 2:
        raise ValueError(f"{op}: head_dim K must be even, got {head_dim}")
    if dtype not in TABLE_DTYPES or sin.dtype not in TABLE_DTYPES:
        name, table = ("sin", sin) if dtype in TABLE_DTYPES else ("cos", cos)
        raise TypeError(f"{op}: {name} must be float32 or float64, got {table.dtype}")
    if cos.requires_grad or sin.requires_grad:
        name = "cos" if cos.requires_grad else "sin"
        raise ValueError(f"{op}: {name} is a constant, got a tensor that requires grad")
    fits = len(shape) == 2 and shape[1] == head_dim // 2 and cos.device == device == sin.device
    if not fits or shape != sin.shape or sin.dtype != dtype:
        raise ValueError(
            f"{op}: cos and sin must be alike, [max_T, {head_dim // 2}] on {device}, got "
            f"{describe(cos)} and {describe(sin)}"
        )


def _check_indices(op: str, name: str, indices: Tensor, q: Tensor) -> None:
    """Raise unless ``indices`` are ``[B, T]`` int64 on the device of ``q``."""
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {indices.dtype}")
    if indices.shape != q.shape[:2] or indices.device != q.device:
        raise ValueError(
            f"{op}: {name} must be {tuple(q.shape[:2])} on {q.device}, got {describe(indices)}"
        )


def _check_places(slots: Tensor, positions: Tensor | None, num_slots: int, max_t: int) -> None:
    """Raise unless the slots lie in the cache and the positions in the tables."""
    _check_range("rope_append", "slots", slots, num_slots)
    if positions is not None:
        _check_range("rope_append", "positions", positions, max_t)
    elif max_t < num_slots:
        _check_range("rope_append", "positions", slots, max_t)


def _check_range(op: str, name: str, indices: Tensor, stop: int) -> None:
    must = f"{name} must lie in [0, {stop})"
    # An index equals its nearest valid one: three kernels, where two comparisons take four.
    inside = (indices.clamp(0, max(stop - 1, 0)) == indices).all()
    if stop == 0:
        inside = inside & (indices.numel() == 0)

    def got() -> str:
        low, high = indices.aminmax()
        return f"{low.item()} … {high.item()}"

    check_values(op, inside, must, got)


def _check_caches(q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    if needs_gradient(q, k, v, key_cache, value_cache):
        raise ValueError(
            "rope_append: it has no gradient, got an input that requires grad; call it under "
            "torch.no_grad()"
        )
    shape, cache_shape, dtype, device = k.shape, key_cache.shape, k.dtype, k.device
    fits = len(cache_shape) == 4 and cache_shape[0] == shape[0] and cache_shape[2:] == shape[2:]
    alike = shape == v.shape and cache_shape == value_cache.shape
    alike = alike and dtype == v.dtype == key_cache.dtype == value_cache.dtype
    if not (fits and alike and device == v.device == key_cache.device == value_cache.device):
        raise ValueError(
            "rope_append: k and v must be alike, and key_cache and value_cache "
            f"[{shape[0]}, S, {shape[2]}, {shape[3]}] {dtype} on {device}, got k {describe(k)}, "
            f"v {describe(v)}, key_cache {describe(key_cache)}, value_cache {describe(value_cache)}"
        )
    _check_written("rope_append", "key_cache", key_cache)
    _check_written("rope_append", "value_cache", value_cache)


def _check_out(q: Tensor, k: Tensor, out: tuple[Tensor, Tensor]) -> None:
    check_no_gradient("rope", q, k, *out)
    for name, x, written in zip(("q", "k"), (q, k), out, strict=True):
        if (written.shape, written.dtype, written.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"rope: out must be like q and k, got {describe(written)} for {name}, {describe(x)}"
            )
        _check_written("rope", f"out for {name}", written)


def _check_written(op: str, name: str, written: Tensor) -> None:
    """Raise unless every element of ``written`` has its own address and K has unit stride."""
    if written.is_contiguous():
        return
    strides = [s for s, size in zip(written.stride(), written.shape, strict=True) if size > 1]
    if 0 in strides or (written.shape[-1] > 1 and written.stride(-1) != 1):
        raise ValueError(
            f"{op}: {name} must have unit stride in K and not be expanded, got strides "
            f"{written.stride()} of {tuple(written.shape)}"
        )
