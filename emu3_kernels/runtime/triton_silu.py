"""SiLU in Triton, in float32."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), by ``exp2``: it flushes subnormal powers, which vanish beside 1.

    ``tl.exp`` would scale its argument and its result to keep them, three instructions more.
    """
    return 1 / (1 + tl.exp2(x * -LOG2E))


@triton.jit
def silu(x):
    return x / (1 + tl.exp2(x * -LOG2E))


@triton.jit
def silu_derivative(x):
    """sigmoid(x) * (1 + x * sigmoid(-x)): 1 - sigmoid(x) would lose digits where x is large."""
    power = tl.exp2(tl.minimum(x * -LOG2E, 115.0))
    of_x = 1 / (1 + power)
    return of_x * (1 + x * (power * of_x))
