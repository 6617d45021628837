"""Sizes of linear_cross_entropy that the tests check and the benchmarks time."""

import torch

CONSTANTS = ("weights",)
CHECK = [
    {"tokens": 0, "width": 8, "classes": 7},
    {"tokens": 1, "width": 1, "classes": 3},
    {"tokens": 5, "width": 24, "classes": 33},
    {"tokens": 7, "width": 24, "classes": 2085, "weighted": True},  # rows padded in the buffer
    {"tokens": 4, "width": 8, "classes": 33, "reduction": "none", "weighted": True},
    {
        "tokens": 6,
        "width": 8,
        "classes": 41,
        "reduction": "sum",
        "z_loss": 0.1,
        "label_smoothing": 0.2,
    },
    {
        "tokens": 9,
        "width": 16,
        "classes": 133,
        "weighted": True,
        "normalizer": 3.5,
        "z_loss": 1e-3,
        "label_smoothing": 0.1,
    },
]
TIME = [
    {"tokens": 2048, "width": 512, "classes": 184_622, "dropped": 0.0},  # Emu3's vocabulary
]
SCALE = [
    {"tokens": 2048, "width": 512, "classes": 184_622, "dropped": 0.75},  # captions only
    {"tokens": 256, "width": 512, "classes": 184_622, "dropped": 0.0},
    {"tokens": 1024, "width": 512, "classes": 184_622, "dropped": 0.0},
    {"tokens": 2048, "width": 512, "classes": 32_768, "dropped": 0.0},
    {"tokens": 2048, "width": 512, "classes": 65_536, "dropped": 0.0},
]


def make(
    *,
    tokens: int,
    width: int,
    classes: int,
    weighted: bool = False,
    dropped: float | None = None,
    dtype: torch.dtype,
    device: str,
    **settings: object,
) -> dict[str, object]:
    """Every third token is ignored; with ``weighted``, the last one has weight 0.

    With ``dropped``, no token is ignored and the first ones have weight 0 in that share.
    """
    random = torch.Generator(device).manual_seed(0)
    on = {"generator": random, "device": device}
    inputs = {
        "hidden": torch.randn(tokens, width, **on).to(dtype),
        "head": (2 * width**-0.5 * torch.randn(classes, width, **on)).to(dtype),
        "targets": torch.randint(classes, (tokens,), **on),
        **settings,
    }
    if weighted:
        inputs["weights"] = torch.rand(tokens, **on)
        inputs["weights"][-1:] = 0
    if dropped is None:
        inputs["targets"][1::3] = -100
    elif dropped:
        inputs["weights"] = (torch.arange(tokens, device=device) >= dropped * tokens).float()
    return inputs


def flops(*, tokens: int, width: int, classes: int, dropped: float, dtype: torch.dtype) -> int:
    """Of the product of the forward pass; the backward pass takes twice as many."""
    return round((1 - dropped) * tokens) * 2 * width * classes
