"""Argument checks and row views that the public functions share.

They run for every decoded token: an attribute of a tensor costs 0.05 to 0.3 microseconds and is
read once, and an error message is built only when it is raised.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from emu3_kernels.runtime.autograd import needs_gradient


def describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}"


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raise unless every tensor holds floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def check_alike(op: str, names: str, first: Tensor, *others: Tensor) -> None:
    """Raise unless all tensors share shape, dtype and device, and are floating point.

    Args:
        op: the public name.
        names: of the tensors, in order: ``"gate and up"``.
        first: the first of them.
        others: the rest.
    """
    shape, dtype, device = first.shape, first.dtype, first.device
    for other in others:
        if other.dtype != dtype or other.shape != shape or other.device != device:
            check_floating(op, **dict(zip(names.split(" and "), (first, *others), strict=True)))
            got = " and ".join(describe(tensor) for tensor in (first, *others))
            raise ValueError(f"{op}: {names} must share shape, dtype and device, got {got}")
    if not dtype.is_floating_point:
        check_floating(op, **{names.split(" and ")[0]: first})


def check_has_channels(op: str, **tensors: Tensor) -> None:
    """Raise for a tensor without dimensions: the op is over the last one."""
    for name, tensor in tensors.items():
        if tensor.dim() == 0:
            raise ValueError(f"{op}: {name} must be [..., C], got a tensor without dimensions")


def check_channel_weight(op: str, x: Tensor, weight: Tensor) -> None:
    """Raise unless ``x`` is ``[..., D]`` and ``weight`` ``[D]``, floating, on the same device."""
    if not (x.is_floating_point() and weight.is_floating_point()):
        check_floating(op, x=x, weight=weight)
    shape = x.shape
    if not shape:
        check_has_channels(op, x=x)
    if weight.shape != shape[-1:] or weight.device != x.device:
        raise ValueError(
            f"{op}: weight must be [{shape[-1]}] on {x.device} as x is {tuple(shape)}, "
            f"got {describe(weight)}"
        )


def check_grouped_heads(
    op: str,
    layout: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    shared: int = 2,
    multiple: bool = True,
) -> None:
    """Raise unless ``q`` is ``[B, T, H, K]`` and ``k``, ``v`` are alike ``[B, T, KV, K]``.

    All are floating point and share dtype and device.

    Args:
        op: the public name.
        layout: the rule in words, such as ``"q must be [B, T, H, K], k and v [B, S, KV, K]"``.
        q: queries.
        k: keys.
        v: values; None if the op takes none.
        shared: the leading dimensions of ``k`` that equal those of ``q``: 2 is B and T, 1 is B.
        multiple: whether H must be a multiple of ``num_kv_heads``.
    """
    shape, kv_shape, dtype, device = q.shape, k.shape, q.dtype, q.device
    fits = len(shape) == len(kv_shape) == 4 and shape[3] == kv_shape[3]
    fits = fits and shape[:shared] == kv_shape[:shared] and k.dtype == dtype and k.device == device
    if v is not None:
        fits = fits and v.shape == kv_shape and v.dtype == dtype and v.device == device
    if not fits or not dtype.is_floating_point:
        given = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
        check_floating(op, **given)
        got = " and ".join(describe(tensor) for tensor in given.values())
        raise ValueError(f"{op}: {layout} of the same dtype and device, got {got}")
    if multiple and (kv_shape[2] == 0 or shape[2] % kv_shape[2]):
        raise ValueError(
            f"{op}: the {shape[2]} query heads must be a multiple of the KV heads, "
            f"got {kv_shape[2]}"
        )


def check_values(op: str, ok: Tensor, must: str, got: Callable[[], str]) -> None:
    """Raise unless the bool ``ok`` is true, without a synchronisation of any other device.

    An eager call on the CPU raises ``ValueError`` at once. A traced call, or one on another
    device, asserts when it runs.

    Args:
        op: the public name.
        ok: 0-d bool.
        must: what must hold.
        got: returns the offending values in words; called only before raising.
    """
    if torch.compiler.is_compiling() or not ok.is_cpu:
        torch._assert_async(ok, f"{op}: {must}")
    elif not ok:
        raise ValueError(f"{op}: {must}, got {got()}")


def check_no_gradient(op: str, *tensors: Tensor) -> None:
    """Raise if autograd would have to record a call that writes to given tensors."""
    if needs_gradient(*tensors):
        raise ValueError(f"{op}: out has no gradient: leave it out, or call under torch.no_grad()")


def copied(results: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy each result to its tensor of ``out``."""
    for written, result in zip(out, results, strict=True):
        written.copy_(result)
    return out


def rows(x: Tensor) -> Tensor:
    """Return ``x [..., C]`` as ``[rows, C]`` with unit stride in C; a view if there is one."""
    if not x.is_contiguous() and x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.dim() == 2:
        return x
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def unit_stride(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return ``x``, copied unless its last dimension has unit stride, and its other strides."""
    *strides, last = x.stride()
    if last == 1:
        return x, strides
    x = x.contiguous()
    return x, x.stride()[:-1]


def unrows(y: Tensor, x: Tensor) -> Tensor:
    """Return ``y``, computed from ``rows(x)``, in the shape of ``x``."""
    return y if x.dim() == 2 else y.view_as(x)
