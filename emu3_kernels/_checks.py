"""Argument checks and row views that the public functions share."""

from torch import Tensor

from emu3_kernels._autograd import needs_gradient


def describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}"


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raise unless every tensor holds floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def check_alike(op: str, **tensors: Tensor) -> None:
    """Raise unless all tensors share shape, dtype and device, and are floating point."""
    check_floating(op, **tensors)
    first, *others = tensors.values()
    if any(
        (o.shape, o.dtype, o.device) != (first.shape, first.dtype, first.device) for o in others
    ):
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
    """Raise unless ``weight`` is ``[D]``, floating, on the device of ``x`` ``[..., D]``."""
    check_floating(op, weight=weight)
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(
            f"{op}: weight must be [{x.shape[-1]}] on {x.device} as x is {tuple(x.shape)}, "
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
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.dim() == 2:
        return x
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, x.shape[-1])
