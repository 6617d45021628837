"""Sizes of the losses that the tests check and the benchmarks time."""

import torch

from emu3_kernels.runtime.cases import Cases


def make_cross_entropy(
    *,
    tokens: int,
    classes: int,
    weighted: bool = False,
    ignored: bool = True,
    dtype: torch.dtype,
    device: str,
    **settings: object,
) -> dict[str, object]:
    """Draw logits; ``ignored`` ignores every third token, ``weighted`` gives the last weight 0."""
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
    """Forward: one read of the logits of valid tokens."""
    valid = tokens - len(range(1, tokens, 3)) if ignored else tokens
    return valid * classes * dtype.itemsize


def training_bytes(*, tokens: int, classes: int, ignored: bool, dtype: torch.dtype) -> int:
    """Forward and backward as one: one read of the valid logits, one gradient for every row."""
    read = bytes_moved(tokens=tokens, classes=classes, ignored=ignored, dtype=dtype)
    return read + tokens * classes * dtype.itemsize


def make_linear_cross_entropy(
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
    """Draw hidden states and a head; every third token is ignored.

    ``weighted`` gives the last token weight 0. With ``dropped``, no token is ignored and that
    share of them, the first ones, has weight 0.
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
    """Of the forward GEMM; the backward pass has two of them."""
    return round((1 - dropped) * tokens) * 2 * width * classes


CASES = {
    "cross_entropy": Cases(
        make=make_cross_entropy,
        check=[
            {"tokens": 0, "classes": 7},
            {"tokens": 3, "classes": 2},
            {"tokens": 5, "classes": 33},  # rows of every misalignment
            {"tokens": 4, "classes": 2085, "weighted": True},  # a CPU block and a ragged one
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
        ],
        time=[
            {"tokens": 256, "classes": 184_622, "ignored": False}  # misaligned rows, 94 MB
        ],
        scale=[
            {"tokens": 1024, "classes": 184_622, "ignored": False},
            {"tokens": 2048, "classes": 184_622, "ignored": False},
            {"tokens": 256, "classes": 32_768, "ignored": False},
            {"tokens": 256, "classes": 65_536, "ignored": False},
        ],
        bytes_moved=bytes_moved,
        training_bytes=training_bytes,
        constants=("weights",),
    ),
    "linear_cross_entropy": Cases(
        make=make_linear_cross_entropy,
        check=[
            {"tokens": 0, "width": 8, "classes": 7},
            {"tokens": 1, "width": 1, "classes": 3},
            {"tokens": 5, "width": 24, "classes": 33},
            {"tokens": 7, "width": 24, "classes": 2085, "weighted": True},  # padded buffer rows
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
        ],
        time=[{"tokens": 2048, "width": 512, "classes": 184_622, "dropped": 0.0}],
        scale=[
            {"tokens": 2048, "width": 512, "classes": 184_622, "dropped": 0.75},  # captions only
            {"tokens": 256, "width": 512, "classes": 184_622, "dropped": 0.0},
            {"tokens": 1024, "width": 512, "classes": 184_622, "dropped": 0.0},
            {"tokens": 2048, "width": 512, "classes": 32_768, "dropped": 0.0},
            {"tokens": 2048, "width": 512, "classes": 65_536, "dropped": 0.0},
        ],
        flops=flops,
        constants=("weights",),
    ),
}
