"""Bytes that a rank holds at the moments of a training step where they are most.

Counted, not measured, from the sizes of the weights of a model on the meta device and from what
each op saves for backward. B rows of a micro-batch, T tokens of a row, n = B T / context tokens of
a rank, D hidden size, F intermediate size, H and G query and KV heads of width K, V classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch

from emu3.config import ModelSettings
from emu3.model import Emu3
from emu3.train.compact_adamw import SLICE, bytes_of_moments
from emu3.train.layout import ParallelSettings
from emu3.train.parallel import cuts
from emu3.train.store_recipe import PretrainOptimSettings

PARTS = (
    "weights",
    "optimizer",
    "gradients",
    "gathered weights",
    "activations kept",
    "block in backward",
    "logits and loss",
    "communication",
    "runtime",
)
"""What a rank holds. ``gradients`` are the sharded sums of a step, and whole ones that are not
reduced yet; ``block in backward`` is what is computed again and the gradients of activations."""

Moment = Mapping[str, int]
"""Bytes by part."""

_LOSS_MEMORY, _MOST_GPU_LOSS_MEMORY = 512 << 20, 4 << 30
"""Of ``linear_cross_entropy``: beside its gradients and copies of hidden states."""
_BYTES_OF_UPDATE = 64
"""Of a number of a slice that is updated in float32."""
RUNTIME, FRAGMENTS = 3 << 30, 0.05
"""Of a GPU: CUDA, NCCL and cuBLAS, and the share of memory between allocations. Estimates, not
measured."""


@dataclass(frozen=True)
class Sizes:
    """Elements of a rank's weights: its shards, and what it gathers."""

    shards: Mapping[str, int]
    """By unit: ``root`` (final norm and head), ``embedding`` and ``block``, each of them one."""
    gathered: Mapping[str, int]
    head: int
    """Of the head, gathered."""
    largest: int
    """Of the largest weight, sharded."""
    num_blocks: int
    quantized: int
    """Bytes of the moments of all shards, in 8 bits."""

    @classmethod
    def of(cls, settings: ModelSettings, parallel: ParallelSettings) -> "Sizes":
        """Count the largest part of every weight that a rank holds."""
        table, sharded_over = cuts(settings), parallel.shard * parallel.context
        shards, gathered = ({"root": 0, "embedding": 0, "block": 0} for _ in range(2))
        largest = quantized = 0
        for name, shape in _shapes(settings).items():
            unit = {"blocks": "block", "embedding": "embedding"}.get(name.split(".")[0], "root")
            whole = shape.numel()
            if (dim := table[name].tensor) is not None:
                whole = whole // shape[dim] * -(-shape[dim] // parallel.tensor)
            gathered[unit] += whole
            part = -(-whole // sharded_over)
            shards[unit] += part
            largest = max(largest, part)
            alike = settings.num_layers if unit == "block" else 1
            quantized += alike * bytes_of_moments(part, quantized=True)
            if name == "head.weight":
                head = whole
        return cls(shards, gathered, head, largest, settings.num_layers, quantized)

    @property
    def own(self) -> int:
        """Elements of all shards of a rank."""
        return self.shards["root"] + self.shards["embedding"] + self.of_blocks

    @property
    def of_blocks(self) -> int:
        return self.num_blocks * self.shards["block"]


@cache
def _shapes(settings: ModelSettings) -> dict[str, torch.Size]:
    """Shapes by name, of the first block and of all outside blocks, which are alike."""
    with torch.device("meta"):
        model = Emu3(settings.model_copy(update={"num_layers": 1}))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class Memory:
    """The memory of a rank that trains ``rows`` rows of ``tokens`` tokens at a time."""

    settings: ModelSettings
    parallel: ParallelSettings
    rows: int
    tokens: int
    accumulates: bool
    """Whether a step has several micro-batches, so that gradients are there in forward."""
    gpu_memory: int | None = None
    """Bytes of a GPU; None is a CPU."""
    optim: PretrainOptimSettings = field(default_factory=PretrainOptimSettings)

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes.of(self.settings, self.parallel)

    @cached_property
    def moments(self) -> dict[str, Moment]:
        """Bytes by moment, in the order of a step, and by part."""
        found = {
            "loss": self._loss(),
            "last block": self._backward(self.sizes.num_blocks),
            "next block": self._backward(self.sizes.num_blocks - 1),
            "reduction": self._reduction(),
            "end of backward": self._end(),
            "update": {"gradients": self._kept(self.gradient * self.sizes.own)}
            | self._slices_of_update(),
        }
        return {name: self._whole(parts) for name, parts in found.items()}

    @property
    def peak(self) -> tuple[str, Moment]:
        return max(self.moments.items(), key=lambda item: sum(item[1].values()))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak[1].values())

    @property
    def element(self) -> int:
        """Bytes of a computed number."""
        return 2 if self.parallel.dtype == "bfloat16" else 4

    @property
    def on_host(self) -> int:
        """Bytes of a rank that are on its host instead of its GPU."""
        if not self.parallel.offload or self.gpu_memory is None:
            return 0
        is_8_bits = self.optim.optimizer == "adamw8bit"
        moments = self.sizes.quantized if is_8_bits else 8 * self.sizes.own
        return (self.weight + self.gradient) * self.sizes.own + moments

    @property
    def weight(self) -> int:
        """Bytes of a sharded weight."""
        return 2 if self.optim.master == "stochastic" else 4

    @property
    def gradient(self) -> int:
        """Bytes of a sharded gradient: those of micro-batches are added up in float32."""
        return 4 if self.accumulates else self.weight

    def _kept(self, num_bytes: int) -> int:
        """Return what a GPU holds of ``num_bytes`` that can be on the host."""
        return 0 if self.parallel.offload and self.gpu_memory is not None else num_bytes

    def _slices_of_update(self) -> Moment:
        """Count what :class:`CompactAdamW` holds of a slice while it is updated."""
        in_flight = _BYTES_OF_UPDATE * min(SLICE, self.sizes.largest)
        return {"optimizer": self._moments + self._kept(in_flight)} if self.optim.is_compact else {}

    @property
    def _moments(self) -> int:
        is_8_bits = self.optim.optimizer == "adamw8bit"
        return self._kept(self.sizes.quantized if is_8_bits else 8 * self.sizes.own)

    @property
    def rank_tokens(self) -> int:
        return self.rows * self.tokens // self.parallel.context

    @cached_property
    def block_activations(self) -> int:
        """Bytes that a block saves for backward, if nothing is computed again.

        Both residual sums ``[n / tensor, D]`` and both inputs of column-parallel GEMMs ``[n, D]``;
        of attention :meth:`_attention_saved`; gate and up, and their product; two float32 a row.
        """
        s, p = self.settings, self.parallel
        own = self.rank_tokens // p.tensor
        mlp = 3 * s.intermediate_size // p.tensor
        of_token = 2 * s.hidden_size + mlp
        in_rows = self.element * 2 * s.hidden_size + 8
        return self.rank_tokens * self.element * of_token + own * in_rows + self._attention_saved

    @property
    def _attention_saved(self) -> int:
        """Rotated queries and keys, values, the result and its lse.

        The values keep the projection of all heads, of which they are a view. Ulysses sends them,
        and the result, so that each rank saves both sides of the result and no projection.
        """
        s, p = self.settings, self.parallel
        query, key = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        projection = query + 2 * key
        if p.context > 1 and p.context_style == "ulysses":
            numbers = projection + 2 * query
        else:
            numbers = projection + (query + key) + query
        return self.rank_tokens * (self.element * numbers + 4 * s.num_heads) // p.tensor

    @cached_property
    def kept_by_block(self) -> int:
        """Bytes that a block keeps from forward to backward.

        With ``all`` its two inputs; with ``all_but_attention`` the result of attention too, where
        a CPU computes it: a GPU computes attention to documents by Triton, again.
        """
        s, p = self.settings, self.parallel
        if p.recompute == "none":
            return self.block_activations
        inputs = 2 * self.element * s.hidden_size * self.rank_tokens // p.tensor
        if p.recompute == "all" or self.gpu_memory is not None:
            return inputs
        result = self.element * s.head_dim + 4
        return inputs + self.rank_tokens * result * s.num_heads // p.tensor

    def _whole(self, parts: Moment) -> Moment:
        s, own = self.settings, self.sizes.own
        # The tables of rotary embeddings, cosines and sines of half a head.
        tables = 4 * s.max_position_embeddings * s.head_dim
        # Tokens, targets, positions, rows of dropout: 8 bytes; weights, documents, key ranges: 4.
        batch = 48 * self.rows * self.tokens
        weights = self._kept(self.weight * own)
        whole = {"weights": weights + tables + batch, "optimizer": self._moments} | parts
        if self.gpu_memory is not None:
            whole["runtime"] = RUNTIME + int(FRAGMENTS * sum(whole.values()))
        return {name: whole.get(name, 0) for name in PARTS}

    def _summed(self) -> int:
        """Gradients of the micro-batches before this one."""
        return self._kept(4 * self.sizes.own * self.accumulates)

    def _loss(self) -> Moment:
        """Forward and both gradients of the loss, while all blocks keep their activations."""
        s, p, e, n = self.settings, self.parallel, self.element, self.rank_tokens
        hidden = e * s.hidden_size * n
        final = 2 * hidden // p.tensor + (hidden if p.tensor > 1 else 0)
        return {
            "gradients": self._summed() + e * self.sizes.head,
            "gathered weights": e * self.sizes.gathered["root"],
            "activations kept": self.sizes.num_blocks * self.kept_by_block + final,
            "logits and loss": hidden + self._loss_memory(),
            "communication": self._buffers(e * self.sizes.gathered["block"]),
        }

    def _loss_memory(self) -> int:
        """What ``linear_cross_entropy`` allocates at most, beside its gradients."""
        s, p, e, n = self.settings, self.parallel, self.element, self.rank_tokens
        classes = self.sizes.head // s.hidden_size
        copies = n * s.hidden_size * (2 * e + 4)
        all_logits = e * n * -(-classes // 64) * 64 + copies + 128 * n
        most = _LOSS_MEMORY + copies + 4 * n * s.hidden_size
        if self.gpu_memory is not None and p.tensor == 1:
            most = max(most, min(self.gpu_memory // 8, _MOST_GPU_LOSS_MEMORY))
        return min(all_logits, most)

    def _backward(self, number: int) -> Moment:
        """Backward of the MLP of block ``number``, whose activations are all there."""
        s, p, e, n = self.settings, self.parallel, self.element, self.rank_tokens
        behind = self.sizes.num_blocks - number
        own = s.hidden_size * n // p.tensor
        # Of gate and up, the branch and the residual; the weights of down.
        grads = 2 * s.intermediate_size * n // p.tensor + s.hidden_size * n + own
        again = 0 if p.recompute == "none" else self.block_activations
        block = e * self.sizes.gathered["block"]
        down = e * s.intermediate_size * s.hidden_size // p.tensor
        reduced = self._reduced(self.sizes.shards["block"] * behind)
        sent = 4 * self.sizes.gathered["block"] if behind else 0
        return {
            "gradients": self._summed() + e * self.sizes.head + reduced + down,
            "gathered weights": e * self.sizes.gathered["root"] + block,
            "activations kept": number * self.kept_by_block,
            "block in backward": again + e * grads,
            "communication": self._buffers(block) + sent + self._ring(),
        }

    def _ring(self) -> int:
        """What a ring holds at most in backward, beside what it saved: keys and values of two hops,
        and half as much again as queries, keys, values, results and their gradients."""
        s, p = self.settings, self.parallel
        if p.context == 1 or p.context_style == "ulysses":
            return 0
        numbers = (4 * s.num_heads + 8 * s.num_kv_heads) * s.head_dim
        return self.element * numbers * self.rank_tokens // p.tensor

    def _reduction(self) -> Moment:
        """Gradients of the last block are summed over ranks."""
        s, p, e, n = self.settings, self.parallel, self.element, self.rank_tokens
        block = self.sizes.gathered["block"]
        reduced = self._reduced(self.sizes.shards["block"])
        return {
            "gradients": self._summed() + e * (self.sizes.head + block) + reduced,
            "gathered weights": e * self.sizes.gathered["root"],
            "activations kept": (self.sizes.num_blocks - 1) * self.kept_by_block,
            "block in backward": 2 * e * s.hidden_size * n // p.tensor,
            "communication": self._buffers(e * block) + 4 * block,
        }

    def _end(self) -> Moment:
        """Gradients of head and embedding, which are whole until then, are summed over ranks."""
        e, size = self.element, self.sizes
        summed = self._summed() or self._reduced(size.of_blocks)
        return {
            "gradients": summed + e * (size.head + size.gathered["embedding"]),
            "gathered weights": e * size.gathered["embedding"],
            "communication": 4 * (size.gathered["root"] + size.shards["root"])
            + self._buffers(e * size.head),
        }

    def _reduced(self, num_weights: int) -> int:
        """Bytes of the summed gradients of weights, if those of a step are not there anyway."""
        return 0 if self.accumulates else self._kept(self.gradient * num_weights)

    def _buffers(self, num_bytes: int) -> int:
        """What is held twice, if weights are sharded."""
        return num_bytes if self.parallel.shard * self.parallel.context > 1 else 0
