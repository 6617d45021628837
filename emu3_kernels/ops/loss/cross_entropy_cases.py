"""Sizes of cross_entropy that the tests check and the benchmarks time."""

import torch

CONSTANTS = ("weights",)
CHECK = [
    {"tokens": 0, "classes": 7},
    {"tokens": 3, "classes": 2},
    {"tokens": 5, "classes": 33},  # rows that start anywhere in a cache line
    {"tokens": 4, "classes": 2085, "weighted": True},  # a block of the CPU kernel and a rest
    {"tokens": 4, "classes": 33, "reduction": "none", "weighted": True},
    {"tokens": 5, "classes": 41, "reduction": "sum", "z_loss": 0.1, "label_smoothing": 0.2},
    {
        "tokens": 5,
        "classes": 2085,
        "weighted": True,
        "normalizer": 3.5,
        "z_loss": 1e-3,
        "label_smoothing": 0.1,
    },
]
TIME = [
    {"tokens": 256, "classes": 184_622, "ignored": False}  # Emu3's vocabulary: odd rows, 94 MB
]
SCALE = [
    {"tokens": 1024, "classes": 184_622, "ignored": False},
    {"tokens": 2048, "classes": 184_622, "ignored": False},
    {"tokens": 256, "classes": 32_768, "ignored": False},
    {"tokens": 256, "classes": 65_536, "ignored": False},
]


def make(
    *,
    tokens: int,
    classes: int,
    weighted: bool = False,
    ignored: bool = True,
    dtype: torch.dtype,
    device: str,
    **settings: object,
) -> dict[str, object]:
    """With ``ignored``, every third token is; with ``weighted``, the last one has weight 0."""
    random = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(tokens, classes, generator=random, device=device)
    targets = torch.randint(classes, (tokens,), generator=random, device=device)
    if ignored:
        targets[1::3] = -100
    inputs = {"logits": logits.to(dtype), "targets": targets, **settings}
    if weighted:
        inputs["weights"] = torch.rand(tokens, generator=random, device=device)
        inputs["weights"][-1:] = 0
    return inputs


def bytes_moved(*, tokens: int, classes: int, ignored: bool, dtype: torch.dtype) -> int:
    """Forward traffic that no implementation can avoid: one read of what counts."""
    counted = tokens - len(range(1, tokens, 3)) if ignored else tokens
    return counted * classes * dtype.itemsize


def training_bytes(*, tokens: int, classes: int, ignored: bool, dtype: torch.dtype) -> int:
    """Of both passes at once: one read of what counts, and a gradient for every row."""
    read = bytes_moved(tokens=tokens, classes=classes, ignored=ignored, dtype=dtype)
    return read + tokens * classes * dtype.itemsize
