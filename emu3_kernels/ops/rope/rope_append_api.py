"""Rotate queries and keys, and let keys and values join a cache.

B batch, T new tokens, S slots of the cache, H query heads, G key/value heads, K head width.
"""

from torch import Tensor

from emu3_kernels.ops.rope import rope_append_reference as reference
from emu3_kernels.ops.rope.rotation import (
    check_heads,
    check_indices,
    check_inside,
    check_tables,
    check_written,
)
from emu3_kernels.runtime.autograd import mark_written, needs_gradient
from emu3_kernels.runtime.checks import describe
from emu3_kernels.runtime.dispatch import choose, load

BACKENDS = load("rope_append", "cpu", "triton")


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
    backend: str | None = None,
) -> Tensor:
    r"""Rotate q and k as :func:`emu3_kernels.rope` does; write k and v into their caches.

    ``key_cache[b, slots[b, t]] = rotated k[b, t]`` and ``value_cache[b, slots[b, t]] = v[b, t]``:
    **both caches are written in place**, no other slot is touched. Computed in float32 (float64
    for float64 inputs) and rounded once. For inference: there is no gradient. q, k and v may be
    strided views of one packed projection, the caches any views with unit stride in K.

    Rows of one length share their slots: ``torch.arange(start, start + T).expand(B, T)``. Pages of
    one pool are the slots of a single row: ``B = 1``, ``key_cache.view(1, pages * page, G, K)``.

    Args:
        q: ``[B, T, H, K]``, any floating dtype, K even.
        k: ``[B, T, G, K]``, dtype and device of ``q``.
        v: same as ``k``.
        cos: ``[max_T, K/2]``, float32 (or float64): see :func:`emu3_kernels.rope_tables`.
        sin: same shape and dtype as ``cos``.
        key_cache: ``[B, S, G, K]``, dtype and device of ``q``.
        value_cache: same shape as ``key_cache``.
        slots: ``[B, T]`` int64 in ``[0, S)``, distinct within a row.
        positions: ``[B, T]`` int64 in ``[0, max_T)``; None is ``slots``, for a row that starts at
            slot 0.
        backend: a key of ``BACKENDS``, ``"reference"``, or None for the first that fits.

    Returns:
        The rotated q, a new tensor.
    """
    check_heads("rope_append", q, k=k)
    check_tables("rope_append", q, cos, sin)
    _check_caches(q, k, v, key_cache, value_cache)
    check_indices("rope_append", "slots", slots, q)
    if positions is None:
        positions = slots
    else:
        check_indices("rope_append", "positions", positions, q)
    inputs = q, k, v, cos, sin, key_cache, value_cache, slots, positions
    chosen = choose("rope_append", BACKENDS, backend, *inputs)
    if chosen != "cpu":  # the native kernel looks for itself
        check_inside("rope_append", "slots", slots, key_cache.shape[1])
        check_inside("rope_append", "positions", positions, cos.shape[0])
    if chosen == "reference":
        return reference.rope_append(*inputs)
    rotated = BACKENDS[chosen].forward(*inputs)
    mark_written(key_cache, value_cache)
    return rotated


def _check_caches(q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    if needs_gradient(q, k, v, key_cache, value_cache):
        raise ValueError(
            "rope_append: it has no gradient, got an input that requires grad; call it under "
            "torch.no_grad()"
        )
    shape, of, dtype, device = k.shape, key_cache.shape, k.dtype, k.device
    fits = len(of) == 4 and of[0] == shape[0] and of[2] == shape[2] and of[3] == shape[3]
    alike = shape == v.shape and of == value_cache.shape
    alike = alike and dtype == v.dtype == key_cache.dtype == value_cache.dtype
    if not (fits and alike and device == v.device == key_cache.device == value_cache.device):
        raise ValueError(
            "rope_append: k and v must be alike, and key_cache and value_cache "
            f"[{shape[0]}, S, {shape[2]}, {shape[3]}] {dtype} on {device}, got k {describe(k)}, "
            f"v {describe(v)}, key_cache {describe(key_cache)}, value_cache {describe(value_cache)}"
        )
    check_written("rope_append", "key_cache", key_cache)
    check_written("rope_append", "value_cache", value_cache)
