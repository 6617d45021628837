"""A static key/value cache: allocated once, filled from the left.

``L`` layers, ``B`` rows, ``S`` positions, ``G`` key/value heads, ``K`` head width.
"""

import torch
from torch import Tensor

from emu3.config import ModelSettings


class KeyValueCache:
    """Keys and values of ``B`` left-padded rows.

    Args:
        settings: the model's shape.
        starts: ``[B]`` int64, how many padding positions each row begins with.
        capacity: positions to hold, padding included.
    """

    def __init__(
        self, settings: ModelSettings, starts: Tensor, capacity: int, dtype: torch.dtype
    ) -> None:
        shape = (
            settings.layers,
            len(starts),
            capacity,
            settings.kv_heads,
            settings.head_width,
        )
        self.keys = torch.zeros(shape, dtype=dtype, device=starts.device)
        self.values = torch.zeros_like(self.keys)
        self.starts = starts
        self.capacity = capacity
        self.length = 0

    def slots(self, num_new: int) -> Tensor:
        """``[B, T]`` where the next ``num_new`` tokens go: after ``length``, in every row."""
        stop = self.length + num_new
        if stop > self.capacity:
            raise ValueError(f"KeyValueCache: {stop} positions exceed its capacity {self.capacity}")
        slots = torch.arange(self.length, stop, device=self.starts.device)
        return slots.expand(len(self.starts), num_new)

    def positions(self, num_new: int) -> Tensor:
        """``[B, T]`` positions of the next ``num_new`` tokens, counted without the padding."""
        return (self.slots(num_new) - self.starts[:, None]).clamp_min(0)

    def mask(self, num_new: int) -> Tensor:
        """``[B, 1, T, S]`` True where a new token may look: causal, and never at padding.

        A padding token sees itself, so that no row of the softmax is empty.
        """
        stop = self.length + num_new
        key = torch.arange(stop, device=self.starts.device)
        query = key[self.length :, None]
        visible = (key <= query) & (key >= self.starts[:, None, None])
        return (visible | (key == query))[:, None]

    def layer(self, index: int, num_new: int) -> tuple[Tensor, Tensor]:
        """Views ``[B, S, G, K]`` of one layer's keys and values, up to the last new token.

        ``advance`` moves ``length`` once every layer has stored the new ones.
        """
        stop = self.length + num_new
        return self.keys[index, :, :stop], self.values[index, :, :stop]

    def advance(self, num_new: int) -> None:
        self.length += num_new
