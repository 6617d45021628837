"""The residual block as two convolutions, for backends that launch them one after the other."""

from collections.abc import Callable

from torch import Tensor

from emu3_kernels.ops.conv3d.plan import Needs, Plan

PLAN = Plan(silu=True)


def forward(
    convolve: Callable[..., Tensor],
    x: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return y and the hidden video."""
    hidden = convolve(x, weight1, bias1, scale1, shift1, None, PLAN)
    return convolve(hidden, weight2, bias2, scale2, shift2, x, PLAN), hidden


def backward(
    convolve_backward: Callable[..., tuple[Tensor | None, ...]],
    dy: Tensor,
    hidden: Tensor,
    needs: tuple[bool, ...],
    x: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return a gradient for each tensor from ``x`` on that ``needs`` one, or None."""
    # The gradient of hidden is needed by whatever comes before it: the first seven tensors.
    of_second = Needs(input=any(needs[:7]), weight=any(needs[7:]))
    dhidden, dweight2, dbias2, dscale2, dshift2 = convolve_backward(
        dy, hidden, weight2, bias2, scale2, shift2, PLAN, of_second
    )
    dx = dweight1 = dbias1 = dscale1 = dshift1 = None
    if any(needs[:5]):
        of_first = Needs(input=any(needs[:3]), weight=any(needs[3:5]))
        dx, dweight1, dbias1, dscale1, dshift1 = convolve_backward(
            dhidden, x, weight1, bias1, scale1, shift1, PLAN, of_first, dy if needs[0] else None
        )
    return dx, dscale1, dshift1, dweight1, dbias1, dscale2, dshift2, dweight2, dbias2
