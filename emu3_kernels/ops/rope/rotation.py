"""What rope and rope_append share: the rotation in plain PyTorch, and argument checks."""

import torch
from torch import Tensor

from emu3_kernels.runtime.checks import check_floating, describe

TABLES = (torch.float32, torch.float64)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate ``x [B, T, H, K]`` by the table rows at ``positions``, ``[B, T]`` or ``[T]``."""
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[positions][..., None, :].to(compute) for table in (cos, sin))
    first, second = x.to(compute).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def check_heads(op: str, q: Tensor, **others: Tensor) -> None:
    """Raise unless ``q`` is ``[B, T, H, K]``, K even, and each of ``others`` ``[B, T, G, K]``."""
    shape, dtype, device = q.shape, q.dtype, q.device
    for name, x in others.items():
        of = x.shape
        fits = len(shape) == len(of) == 4 and shape[0] == of[0] and shape[1] == of[1]
        if not (fits and shape[3] == of[3] and x.dtype == dtype and x.device == device):
            check_floating(op, q=q, **{name: x})
            raise ValueError(
                f"{op}: q must be [B, T, H, K] and {name} [B, T, G, K] of the same dtype and "
                f"device, got {describe(q)} and {describe(x)}"
            )
    if not dtype.is_floating_point:
        check_floating(op, q=q)
    if shape[3] % 2:
        raise ValueError(f"{op}: the head width K must be even, got {shape[3]}")


def check_tables(op: str, q: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise unless both tables are constants ``[max_T, K/2]`` on the device of ``q``."""
    shape, half, dtype = cos.shape, q.shape[3] // 2, cos.dtype
    if dtype not in TABLES or sin.dtype not in TABLES:
        name, table = ("sin", sin) if dtype in TABLES else ("cos", cos)
        raise TypeError(f"{op}: {name} must be float32 or float64, got {table.dtype}")
    if cos.requires_grad or sin.requires_grad:
        name = "cos" if cos.requires_grad else "sin"
        raise ValueError(f"{op}: {name} is a constant, got a tensor that requires grad")
    fits = len(shape) == 2 and shape[1] == half and cos.device == q.device == sin.device
    if not fits or shape != sin.shape or sin.dtype != dtype:
        raise ValueError(
            f"{op}: cos and sin must be alike, [max_T, {half}] on {q.device}, got "
            f"{describe(cos)} and {describe(sin)}"
        )


def check_indices(op: str, name: str, indices: Tensor, q: Tensor) -> None:
    """Raise unless ``indices`` are ``[B, T]`` int64 on the device of ``q``."""
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {indices.dtype}")
    of, shape = indices.shape, q.shape
    fits = len(of) == 2 and of[0] == shape[0] and of[1] == shape[1]
    if not fits or indices.device != q.device:
        raise ValueError(
            f"{op}: {name} must be {tuple(shape[:2])} on {q.device}, got {describe(indices)}"
        )


def check_inside(op: str, name: str, indices: Tensor, stop: int) -> None:
    """Look at the values: at once in eager calls on a CPU, elsewhere without synchronisation."""
    inside = ((indices >= 0) & (indices < stop)).all()
    must = f"{op}: {name} must lie in [0, {stop})"
    if torch.compiler.is_compiling() or indices.device.type != "cpu":
        torch._assert_async(inside, must)
    elif not inside:
        low, high = indices.aminmax()
        raise ValueError(f"{must}, got {low.item()} … {high.item()}")


def check_written(op: str, name: str, written: Tensor) -> None:
    """Raise unless every element of ``written`` has a place of its own, K with unit stride."""
    if written.is_contiguous():
        return
    strides = [s for s, size in zip(written.stride(), written.shape, strict=True) if size > 1]
    if 0 in strides or (written.shape[-1] > 1 and written.stride(-1) != 1):
        raise ValueError(
            f"{op}: {name} must have unit stride in K and not be expanded, got strides "
            f"{written.stride()} of {tuple(written.shape)}"
        )
