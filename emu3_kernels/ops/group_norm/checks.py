"""Argument checks of the group norms."""

from torch import Tensor

from emu3_kernels.runtime.checks import check_floating, describe


def check_group_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    check_floating(op, x=x)
    if x.dim() not in (4, 5):
        raise ValueError(f"{op}: x must be [B, C, H, W] or [B, C, T, H, W], got {describe(x)}")
    channels = x.shape[1]
    if groups < 1 or channels < groups or channels % groups:
        raise ValueError(
            f"{op}: groups must divide the channels of x, got {groups} of {tuple(x.shape)}"
        )
    check_parameters(op, x, (channels,), weight=weight, bias=bias)


def check_parameters(op: str, x: Tensor, shape: tuple[int, ...], **parameters: Tensor) -> None:
    """Raise unless every parameter has ``shape``, is floating, and lies on the device of ``x``."""
    check_floating(op, **parameters)
    for name, parameter in parameters.items():
        if parameter.shape != shape or parameter.device != x.device:
            raise ValueError(
                f"{op}: {name} must be {list(shape)} on {x.device} as x is {tuple(x.shape)}, "
                f"got {describe(parameter)}"
            )
