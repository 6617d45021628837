"""What the Triton files of the ops share."""

import os

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads the variable when a kernel is decorated; so do we, once, at import."""

NUM_MULTIPROCESSORS = (
    torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 4
)
"""Programs that a persistent kernel launches; a small number stands in without a GPU."""


def why_not_triton(tensor: Tensor) -> str | None:
    """Say why a Triton kernel cannot run on ``tensor``; None if it can."""
    if tensor.device.type != "cuda" and not (INTERPRETED and tensor.device.type == "cpu"):
        return f"Triton has no {tensor.device.type} target here"
    if tensor.dtype == torch.float64:
        return "float64 is left to the reference"
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        return "Triton's interpreter is wrong in bfloat16 (ttsem tests it instead)"
    return None


def next_power_of_2(n: int) -> int:
    return triton.next_power_of_2(n)
