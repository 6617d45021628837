"""Bytes that a rank holds at the moments of a training step where they are most.

Counted, not measured, from the sizes of the weights of a model on the meta device and from what
each op saves for backward. B rows of a micro-batch, T tokens of a row, n = B T / context tokens of
a rank, D hidden size, F intermediate size, H and G query and KV heads of width K, V classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch

from emu3.config import ModelSettings
from emu3.model import Emu3
from emu3.train.compact_adamw import SLICE, bytes_of_moments
from emu3.train.layout import ParallelSettings
from emu3.train.lora import LoraSettings, is_trained
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
    """Bytes of the moments of all that is trained, in 8 bits."""
    trained: Mapping[str, int]
    """As ``shards``, without frozen weights; ``block`` is that of which most is trained, and
    ``blocks`` are all."""
    adapters: int = 0
    """Of LoRA, which every FSDP rank holds whole."""

    @classmethod
    def of(
        cls,
        settings: ModelSettings,
        parallel: ParallelSettings,
        lora: LoraSettings | None = None,
        freeze: Sequence[str] = (),
    ) -> "Sizes":
        """Count the largest part of every weight that a rank holds."""
        table, sharded_over = cuts(settings), parallel.shard * parallel.context
        shards, gathered, trained = ({"root": 0, "embedding": 0, "block": 0} for _ in range(3))
        of_blocks, largest, quantized, adapters = [0] * settings.num_layers, 0, 0, 0
        for name, shape in _shapes(settings).items():
            unit = {"blocks": "block", "embedding": "embedding"}.get(name.split(".")[0], "root")
            whole = shape.numel()
            if (dim := table[name].tensor) is not None:
                whole = whole // shape[dim] * -(-shape[dim] // parallel.tensor)
            gathered[unit] += whole
            part = -(-whole // sharded_over)
            shards[unit] += part
            largest = max(largest, part)
            if name == "head.weight":
                head = whole
            if lora is not None:
                adapters += settings.num_layers * _adapter(name, shape, dim, parallel, lora)
                continue
            names = [name]
            if unit == "block":
                leaf = name.removeprefix("blocks.0.")
                names = [f"blocks.{number}.{leaf}" for number in range(settings.num_layers)]
            are_trained = [is_trained(one, freeze) for one in names]
            quantized += sum(are_trained) * bytes_of_moments(part, quantized=True)
            if unit == "block":
                of_blocks = [n + part * of for n, of in zip(of_blocks, are_trained, strict=True)]
            else:
                trained[unit] += part * are_trained[0]
        trained |= {"block": max(of_blocks), "blocks": sum(of_blocks)}
        return cls(
            shards, gathered, head, largest, settings.num_layers, quantized, trained, adapters
        )

    @property
    def own(self) -> int:
        """Elements of all shards of a rank, without adapters."""
        return self.shards["root"] + self.shards["embedding"] + self.of_blocks

    @property
    def own_trained(self) -> int:
        """Elements that have a gradient and moments."""
        of = self.trained
        return of["root"] + of["embedding"] + of["blocks"] + self.adapters

    def gradient(self, unit: str) -> int:
        """Elements of a unit's whole gradient; all of them if any is trained."""
        return self.gathered[unit] if self.trained[unit] else 0

    @property
    def head_gradient(self) -> int:
        return self.head if self.trained["root"] else 0

    @property
    def of_blocks(self) -> int:
        return self.num_blocks * self.shards["block"]


def _adapter(
    name: str, shape: torch.Size, dim: int | None, parallel: ParallelSettings, lora: LoraSettings
) -> int:
    """Elements of the adapter of a weight that a rank holds."""
    if name.removesuffix(".weight").rpartition(".")[2] not in lora.targets:
        return 0
    sides = [side // (parallel.tensor if at == dim else 1) for at, side in enumerate(shape)]
    return lora.rank * sum(sides)


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
    lora: LoraSettings | None = None
    freeze: tuple[str, ...] = ()

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes.of(self.settings, self.parallel, self.lora, self.freeze)

    @cached_property
    def moments(self) -> dict[str, Moment]:
        """Bytes by moment, in the order of a step, and by part."""
        found = {
            "loss": self._loss(),
            "last block": self._backward(self.sizes.num_blocks),
            "next block": self._backward(self.sizes.num_blocks - 1),
            "reduction": self._reduction(),
            "end of backward": self._end(),
            "update": {"gradients": self._kept(self.gradient * self.sizes.own_trained)}
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
        size = self.sizes
        return self.weight * size.own + self.gradient * size.own_trained + self._all_moments

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
    def _all_moments(self) -> int:
        is_8_bits = self.optim.optimizer == "adamw8bit"
        return self.sizes.quantized if is_8_bits else 8 * self.sizes.own_trained

    @property
    def _moments(self) -> int:
        return self._kept(self._all_moments)

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
        saved = self.rank_tokens * self.element * of_token + own * in_rows + self._attention_saved
        return saved + self.rank_tokens * self._adapters_saved

    @property
    def _adapters_saved(self) -> int:
        """Bytes of a token: what ``A`` reads, if that is a float32 copy, and what ``B`` reads."""
        if self.lora is None:
            return 0
        s, tensor = self.settings, self.parallel.tensor
        inputs = {"qkv": s.hidden_size, "gate_up": s.hidden_size}
        inputs["out"] = s.num_heads * s.head_dim // tensor
        inputs["down"] = s.intermediate_size // tensor
        is_copy = self.element < 4 or self.lora.dropout > 0
        return 4 * sum(is_copy * inputs[name] + self.lora.rank for name in self.lora.targets)

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
        weights = self._kept(self.weight * own) + 4 * self.sizes.adapters
        whole = {"weights": weights + tables + batch, "optimizer": self._moments} | parts
        if self.gpu_memory is not None:
            whole["runtime"] = RUNTIME + int(FRAGMENTS * sum(whole.values()))
        return {name: whole.get(name, 0) for name in PARTS}

    def _summed(self) -> int:
        """Gradients of the micro-batches before this one."""
        return self._kept(4 * self.sizes.own_trained * self.accumulates)

    def _loss(self) -> Moment:
        """Forward and both gradients of the loss, while all blocks keep their activations."""
        s, p, e, n = self.settings, self.parallel, self.element, self.rank_tokens
        hidden = e * s.hidden_size * n
        final = 2 * hidden // p.tensor + (hidden if p.tensor > 1 else 0)
        return {
            "gradients": self._summed() + e * self.sizes.head_gradient,
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
        trains = self.sizes.trained["block"] > 0
        down = e * s.intermediate_size * s.hidden_size // p.tensor * trains
        reduced = self._reduced(self.sizes.trained["block"] * behind + self.sizes.adapters)
        sent = 4 * self.sizes.gradient("block") if behind else 0
        return {
            "gradients": self._summed() + e * self.sizes.head_gradient + reduced + down,
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
        block = self.sizes.gradient("block")
        reduced = self._reduced(self.sizes.trained["block"] + self.sizes.adapters)
        return {
            "gradients": self._summed() + e * (self.sizes.head_gradient + block) + reduced,
            "gathered weights": e * self.sizes.gathered["root"],
            "activations kept": (self.sizes.num_blocks - 1) * self.kept_by_block,
            "block in backward": 2 * e * s.hidden_size * n // p.tensor,
            "communication": self._buffers(e * block) + 4 * block,
        }

    def _end(self) -> Moment:
        """Gradients of head and embedding, which are whole until then, are summed over ranks."""
        e, size = self.element, self.sizes
        summed = self._summed() or self._reduced(size.trained["blocks"] + size.adapters)
        return {
            "gradients": summed + e * (size.head_gradient + size.gradient("embedding")),
            "gathered weights": e * size.gathered["embedding"],
            "communication": 4 * (size.gradient("root") + size.trained["root"])
            + self._buffers(e * size.head_gradient),
        }

    def _reduced(self, num_weights: int) -> int:
        """Bytes of the summed gradients of weights, if those of a step are not there anyway."""
        return 0 if self.accumulates else self._kept(self.gradient * num_weights)

    def _buffers(self, num_bytes: int) -> int:
        """What is held twice, if weights are sharded."""
        return num_bytes if self.parallel.shard * self.parallel.context > 1 else 0
