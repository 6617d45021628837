"""Argument checks and row views that the public functions share.

They stand in the way of every decoded token: an attribute of a tensor costs 0.05 to 0.3
microseconds and is asked for once, what an error says is put together where it is raised.
"""

from math import prod

from torch import Tensor

from emu3_kernels.runtime.autograd import needs_gradient


def describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}"


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raise unless every tensor holds floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def check_alike(op: str, **tensors: Tensor) -> None:
    """Raise unless all tensors share shape, dtype and device, and are floating point."""
    first, *others = tensors.values()
    shape, dtype, device = first.shape, first.dtype, first.device
    if not dtype.is_floating_point:
        check_floating(op, **tensors)
    for other in others:
        if other.dtype != dtype or other.shape != shape or other.device != device:
            check_floating(op, **tensors)
            got = " and ".join(describe(tensor) for tensor in tensors.values())
            raise ValueError(
                f"{op}: {' and '.join(tensors)} must share shape, dtype and device, got {got}"
            )


def check_has_channels(op: str, **tensors: Tensor) -> None:
    """Raise for a tensor without dimensions: an op over the last one needs it."""
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


def check_no_gradient(op: str, *tensors: Tensor) -> None:
    """Raise if autograd would have to record a call that writes to given tensors."""
    if needs_gradient(*tensors):
        raise ValueError(f"{op}: out has no gradient: leave it out, or call under torch.no_grad()")


def copied(results: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy each result to where it is asked for."""
    for written, result in zip(out, results, strict=True):
        written.copy_(result)
    return out


def rows(x: Tensor) -> Tensor:
    """View ``x`` ``[..., C]`` as ``[rows, C]`` with unit stride in C; copy only if no view is."""
    if not x.is_contiguous() and x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.dim() == 2:
        return x
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def unrows(y: Tensor, x: Tensor) -> Tensor:
    """View ``y``, made of ``rows(x)``, in the shape of ``x``."""
    return y if x.dim() == 2 else y.view_as(x)
