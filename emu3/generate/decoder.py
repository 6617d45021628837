"""Decode steps over a cache; each is one CUDA graph where asked."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.cache import KeyValueCache
from emu3.cuda_graph import CapturedStep
from emu3.model import Emu3


class Decoder:
    """Feeds the tokens of the last step to the model; the host waits for nothing.

    Args:
        model: in eval mode.
        cache: empty.
        choose: from hidden states ``[B, D]`` to what a step returns, the ``[B]`` tokens that the
            next one feeds, and the logits.
        graph: whether to replay steps as CUDA graphs.
    """

    def __init__(
        self,
        model: Emu3,
        cache: KeyValueCache,
        choose: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
        graph: bool,
    ) -> None:
        self.model, self.cache, self.choose, self.graph = model, cache, choose, graph
        self.token = torch.zeros_like(cache.lengths, dtype=torch.int64)
        self.largest: Tensor | None = None
        """``[B]``, the magnitude of each row's largest logit over all steps; NaN stays NaN."""
        self._steps: dict[tuple[int, ...], Callable[[], Tensor]] = {}

    def start(self, tokens: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Feed the prompts ``tokens [B, T]``."""
        hidden = self.model(tokens, self.cache, prompt_lengths=prompt_lengths)
        rows = torch.arange(len(hidden), device=hidden.device)
        return self._next(hidden[rows, prompt_lengths - 1])

    def step(self, *forced: int) -> Tensor:
        """Feed each row's last token and, after it, the ``forced`` ones."""
        if forced not in self._steps:
            step = partial(self._feed, forced)
            self._steps[forced] = CapturedStep(step, self.token.device) if self.graph else step
        cache, num_new = self.cache, 1 + len(forced)
        cache.check_room(num_new)
        longest = cache.longest + num_new
        result = self._steps[forced]()
        cache.longest = longest  # a replay runs no Python
        return result

    def check_finite(self) -> None:
        """Raise if logits of a step were not finite; on a GPU, the host waits for it here alone."""
        if self.largest is not None:
            check_finite(self.largest)

    def _feed(self, forced: tuple[int, ...]) -> Tensor:
        tokens = self.token[:, None]
        for one in forced:
            tokens = F.pad(tokens, (0, 1), value=one)
        return self._next(self.model(tokens, self.cache)[:, -1])

    def _next(self, hidden: Tensor) -> Tensor:
        result, token, logits = self.choose(hidden)
        self.token.copy_(token)
        largest = logits.amax(-1).abs()
        if self.largest is None:
            self.largest = largest
        else:
            torch.maximum(self.largest, largest, out=self.largest)
        return result


def check_finite(largest: Tensor) -> None:
    """Raise unless the largest logits of all rows were finite; the host waits for the device."""
    if not largest.isfinite().all():
        raise ValueError(
            "generate: logits must be finite, got NaN or infinity: check the weights, and that the "
            "model's dtype has their range"
        )


def pad_right(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the right: ids ``[B, T]`` and the prompt lengths ``[B]``."""
    prompt_lengths = torch.tensor([len(ids) for ids in prompts])
    longest = int(prompt_lengths.max())
    return torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in prompts]), prompt_lengths


def uses_graph(model: Emu3, asked: bool | None) -> bool:
    device = model.head.weight.device
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
    like = model.head(model.head.weight[:0])  # dtype of keys and values, under autocast too
    return KeyValueCache(model.settings, batch, capacity, dtype=like.dtype, device=like.device)


def check_prompts(model: Emu3, rows: Sequence) -> None:
    if model.training:
        raise ValueError("generate: the model must be in eval mode, call model.eval() first")
    if len(rows) == 0:
        raise ValueError("generate: nothing to continue, got an empty batch")


def to_device_of(model: Emu3, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(model.head.weight.device) for tensor in tensors]
