"""Floating-point operations of a training step, and what a GPU could do."""

import torch

from emu3.config import ModelSettings

_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 FLOP/s with float32 sums, from NVIDIA's data sheets."""


def step_flops(settings: ModelSettings, tokens: float, pairs: float) -> float:
    """Return the FLOPs of forward and backward: ``6 P tokens + 12 L H K pairs``.

    P counts the weights of GEMMs: all but embedding and norms. What is computed again in backward
    does not count.

    Args:
        tokens: of the step.
        pairs: of a token and one that it attends to, in all.
    """
    return 6 * num_gemm_weights(settings) * tokens + (
        12 * settings.num_layers * settings.num_heads * settings.head_dim * pairs
    )


def num_gemm_weights(s: ModelSettings) -> int:
    attention = 2 * (s.num_heads + s.num_kv_heads) * s.head_dim
    block = s.hidden_size * (attention + 3 * s.intermediate_size)
    return s.num_layers * block + s.vocabulary.size * s.hidden_size


def peak_flops(device: torch.device, dtype: str, *, tf32: bool) -> float | None:
    """Return the FLOP/s of a GPU's GEMMs in a dtype; None if they are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for word, peak in _PEAKS.items() if word in name), None)
    if peak is None or (dtype == "float32" and not tf32):
        return None
    return peak / 2 if dtype == "float32" else peak
