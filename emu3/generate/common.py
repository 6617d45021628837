"""What every decode loop needs: padded prompts, a cache, whether to capture its steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from emu3.cache import KeyValueCache
from emu3.model import Emu3

NOT_FINITE = (
    "generate: logits must be finite, got NaN or infinity: check the weights, and that the model's "
    "dtype has their range"
)


def check_finite(largest: Tensor) -> None:
    """Raise unless the largest logits of all rows are finite; the host waits for the device."""
    if not largest.isfinite().all():
        raise ValueError(NOT_FINITE)


def pad_right(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the right: ids ``[B, T]`` and the prompt lengths ``[B]``."""
    prompt_lengths = torch.tensor([len(ids) for ids in prompts])
    longest = int(prompt_lengths.max())
    return torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in prompts]), prompt_lengths


def uses_graph(model: Emu3, asked: bool | None) -> bool:
    device = model.embedding.weight.device
    casts = torch.is_autocast_enabled(device.type)
    if asked is None:
        return device.type == "cuda" and not casts
    if asked and (device.type != "cuda" or casts):
        got = "torch.autocast" if casts else f"one on {device}"
        raise ValueError(
            f"generate: cuda_graph needs a model on a GPU, without autocast, got {got}"
        )
    return asked


def new_cache(model: Emu3, batch: int, capacity: int) -> KeyValueCache:
    like = model.head(model.embedding.weight[:0])  # dtype of keys and values, under autocast too
    return KeyValueCache(model.settings, batch, capacity, dtype=like.dtype, device=like.device)


def check_prompts(model: Emu3, rows: Sequence) -> None:
    if model.training:
        raise ValueError("generate: the model must be in eval mode, call model.eval() first")
    if len(rows) == 0:
        raise ValueError("generate: nothing to continue, got an empty batch")


def to_device_of(model: Emu3, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(model.embedding.weight.device) for tensor in tensors]
