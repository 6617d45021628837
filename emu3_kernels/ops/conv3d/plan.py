"""The tensors and settings of a causal convolution as its backends take them, and their checks.

B batch, C channels in, O channels out, T frames, H rows, W columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from emu3_kernels.runtime.checks import check_floating, describe


class Plan(NamedTuple):
    """The settings that every backend takes beside the tensors."""

    stride: tuple[int, int, int] = (1, 1, 1)
    front: int = 2
    """Frames of zeros ahead of the first."""
    silu: bool = False
    """SiLU before the convolution, after scale and shift."""
    post_silu: bool = False
    """SiLU after the bias, before the residual is added."""
    is_piece: bool = False
    """Of a video in pieces, whose results have the bits of the whole."""

    @property
    def native(self) -> tuple[tuple[int, int, int], int, bool, bool]:
        """The settings as the compiled kernels take them."""
        return self[:4]


class Inputs(NamedTuple):
    """The tensors of one convolution, in the order in which every backend takes them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None


class Needs(NamedTuple):
    """The gradients that a backward pass computes."""

    input: bool
    """Those of x, scale and shift: the last two are sums over the same elements."""
    weight: bool
    """Those of weight and bias."""


ALL = Needs(input=True, weight=True)


def volume(shape: Sequence[int]) -> int:
    """Count the elements of a channel, or the taps of a kernel."""
    _, _, frames, height, width = shape
    return frames * height * width


def num_frames(total: int, kernel: int, stride: int) -> int:
    """Count the output frames of ``total`` input frames, the zeros ahead included."""
    return max(0, (total - kernel) // stride + 1)


def out_shape(x: Tensor, weight: Tensor, plan: Plan) -> tuple[int, int, int, int, int]:
    """Return ``(B, O, T', H', W')``."""
    batch, _, frames, height, width = x.shape
    out, _, kernel, _, _ = weight.shape
    st, sh, sw = plan.stride
    return batch, out, num_frames(frames + plan.front, kernel, st), height // sh, width // sw


def space_pads(kernel: int, stride: int) -> tuple[int, int]:
    """Return Emu3's zero padding before and after an axis of space."""
    pad = kernel - stride
    return pad // 2 + pad % 2, pad // 2


def check_x(op: str, x: Tensor) -> None:
    if not x.is_floating_point():
        check_floating(op, x=x)
    if x.dim() != 5 or x.shape[1] == 0:
        raise ValueError(
            f"{op}: x must be [B, C, T, H, W] with at least one channel, got {tuple(x.shape)}"
        )


def check_weight(op: str, x: Tensor, **weights: Tensor) -> None:
    channels, device = x.shape[1], x.device
    for name, weight in weights.items():
        if not weight.is_floating_point():
            check_floating(op, **{name: weight})
        shape = weight.shape
        if len(shape) != 5 or shape[1] != channels or 0 in shape:
            raise ValueError(
                f"{op}: {name} must be [O, {channels}, kt, kh, kw] as x has {channels} channels, "
                f"got {tuple(shape)}"
            )
        if weight.device != device:
            _check_device(op, x, name, weight)


def check_vectors(op: str, x: Tensor, length: int, **vectors: Tensor | None) -> None:
    """Raise unless each is None or floating ``[length]`` on the device of ``x``."""
    device = x.device
    for name, vector in vectors.items():
        if vector is None:
            continue
        if not vector.is_floating_point():
            check_floating(op, **{name: vector})
        if vector.shape != (length,):
            raise ValueError(f"{op}: {name} must be [{length}], got {tuple(vector.shape)}")
        if vector.device != device:
            _check_device(op, x, name, vector)


def check_residual(
    op: str, x: Tensor, shape: tuple[int, int, int, int, int], residual: Tensor | None
) -> None:
    if residual is None:
        return
    if (residual.shape, residual.dtype, residual.device) != (shape, x.dtype, x.device):
        raise ValueError(
            f"{op}: residual must be {shape} {x.dtype} {x.device} as the result is, "
            f"got {describe(residual)}"
        )


def _check_device(op: str, x: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} as x is, got {tensor.device}")
