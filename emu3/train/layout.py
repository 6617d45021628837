"""The ranks of a training as replicate x shard x context x tensor, and what each of them reads.

B rows of a data rank, T tokens of a row, C context ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import PositiveInt, model_validator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from typing_extensions import Self

from emu3.config import ModelSettings
from emu3.settings import Settings
from emu3_kernels import shard_sequence


class ParallelSettings(Settings):
    """How the decoder is trained on ``replicate x shard x context x tensor`` ranks."""

    replicate: PositiveInt = 1
    """Copies of the weights; each is sharded over shard x context ranks, and read by them."""
    shard: PositiveInt = 1
    context: PositiveInt = 1
    """Ranks that share the tokens of a row."""
    tensor: PositiveInt = 1
    """Ranks that share heads, the MLP and the vocabulary."""
    context_style: Literal["ulysses", "ring"] = "ulysses"
    """``ulysses`` exchanges heads for tokens: context x tensor must divide the KV heads. ``ring``
    sends keys and values around."""
    recompute: Literal["none", "all_but_attention", "all"] = "none"
    """Activations of a block that backward computes again."""
    compile: bool = False
    """``torch.compile`` of each block, with dropout once for each micro-batch of a step. A ring
    breaks its graph."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of computation; weights, their gradients and optimizer state are float32, if ``optim`` does
    not say otherwise."""
    offload: bool = False
    """Keep weights, gradients and optimizer state on the host, which updates them too: for GPUs
    that do not hold them. A block's weights travel to the GPU in forward and in backward."""

    @property
    def num_ranks(self) -> int:
        return self.replicate * self.shard * self.context * self.tensor

    @model_validator(mode="after")
    def _ring_recomputes_all(self) -> Self:
        ring = self.context > 1 and self.context_style == "ring"
        if ring and self.recompute == "all_but_attention":
            raise ValueError(
                "recompute must be none or all with a ring, whose messages are sent again"
            )
        return self


class Batch(NamedTuple):
    """Packed rows of a data rank, each ``[B, T]``; targets are the next tokens."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    """Of the targets, float32; 0 for the first token of a document."""
    positions: Tensor
    """int64, of each token in its document."""
    documents: Tensor
    """int32, non-decreasing along T."""

    @classmethod
    def of(cls, ids: Tensor, weights: Tensor, documents: Tensor) -> "Batch":
        """Shift rows ``[B, T + 1]`` of ids, their weights and the numbers of their documents."""
        documents = documents[:, :-1]
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        index = torch.arange(documents.shape[1], device=ids.device).expand_as(documents)
        positions = index - torch.where(starts, index, 0).cummax(1).values
        return cls(ids[:, :-1], ids[:, 1:], weights[:, 1:], positions, documents)

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device) for x in self))

    def split(self, rows: int) -> list["Batch"]:
        """Return its micro-batches of ``rows`` rows."""
        return [Batch(*parts) for parts in zip(*(x.split(rows) for x in self), strict=True)]


@dataclass(frozen=True)
class Layout:
    """The ranks, in the order (replicate, shard, context, tensor): two views of one world."""

    settings: ParallelSettings
    groups: DeviceMesh
    """replicate, shard, context, tensor."""
    storage: DeviceMesh
    """replicate, fsdp = shard x context, tensor: where weights are stored."""

    @classmethod
    def of(cls, settings: ParallelSettings, device: str) -> "Layout":
        """Lay the world out; its process group must exist.

        Args:
            settings: sizes whose product is the number of ranks.
            device: type of the devices, ``"cpu"`` or ``"cuda"``.
        """
        s, world = settings, dist.get_world_size()
        if s.num_ranks != world:
            raise ValueError(
                f"parallel: replicate x shard x context x tensor must be the {world} ranks, got "
                f"{s.replicate} x {s.shard} x {s.context} x {s.tensor} = {s.num_ranks}"
            )
        groups = (s.replicate, s.shard, s.context, s.tensor)
        storage = (s.replicate, s.shard * s.context, s.tensor)
        return cls(
            settings,
            init_device_mesh(
                device, groups, mesh_dim_names=("replicate", "shard", "context", "tensor")
            ),
            init_device_mesh(device, storage, mesh_dim_names=("replicate", "fsdp", "tensor")),
        )

    @cached_property
    def host(self) -> DeviceMesh:
        """:attr:`storage` of what is on the host. Every rank must call, the first time."""
        if self.storage.device_type == "cpu":
            return self.storage
        names = self.storage.mesh_dim_names
        return init_device_mesh("cpu", self.storage.shape, mesh_dim_names=names)

    def rank(self, name: str) -> int:
        return self.groups.get_local_rank(name)

    def group(self, name: str) -> dist.ProcessGroup:
        return self.groups.get_group(name)

    @property
    def rank_of_storage(self) -> tuple[int, int]:
        """The part of the weights that this rank holds: of fsdp and of tensor ranks."""
        return self.storage.get_local_rank("fsdp"), self.storage.get_local_rank("tensor")

    @property
    def data_rank(self) -> int:
        """Which of the ``data_ranks`` readers of rows this rank is."""
        return self.rank("replicate") * self.settings.shard + self.rank("shard")

    @property
    def data_ranks(self) -> int:
        return self.settings.replicate * self.settings.shard

    def cut(self, x: Tensor) -> Tensor:
        """Return this rank's tokens of ``x [B, T, ...]``, T/C of them."""
        s, rank = self.settings, self.rank("context")
        if s.context == 1:
            return x
        if s.context_style == "ring":
            return shard_sequence(x, (rank, s.context))
        return x.chunk(s.context, 1)[rank]

    def sum(self, x: Tensor) -> Tensor:
        """Add up over data and context ranks what all tensor ranks hold: a part of the loss."""
        total = x.detach().clone()
        dist.all_reduce(total)
        return total / self.settings.tensor

    def total_weight(self, batches: Sequence[Batch]) -> Tensor:
        """Return the weight of a step: of all micro-batches, here and on all other data ranks."""
        counts = self.rank("context") == self.rank("tensor") == 0
        total = torch.stack([batch.weights.double().sum() for batch in batches]).sum() * counts
        dist.all_reduce(total)
        return total.float()


def check_fits(settings: ParallelSettings, model: ModelSettings, tokens: int) -> None:
    """Raise unless rows of ``tokens`` of a model can be laid out so."""
    s = settings
    heads = s.tensor * (s.context if s.context_style == "ulysses" else 1)
    parts = "tensor x context ranks" if s.context_style == "ulysses" else "tensor ranks"
    divides = (
        ("num_kv_heads", model.num_kv_heads, parts, heads),
        ("intermediate_size", model.intermediate_size, "tensor ranks", s.tensor),
        ("hidden_size", model.hidden_size, "shard x context ranks", s.shard * s.context),
        ("hidden_size", model.hidden_size, "tensor ranks", s.tensor),
        ("tokens of a row", tokens, "context x tensor ranks", s.context * s.tensor),
    )
    for name, value, ranks, size in divides:
        if value % size:
            raise ValueError(
                f"parallel: {name} must be a multiple of the {size} {ranks}, got {value}"
            )
    if s.context_style == "ring" and s.context > 1 and tokens % (2 * s.context):
        raise ValueError(
            f"parallel: tokens of a row must be a multiple of {2 * s.context}, twice the context "
            f"ranks of a ring, got {tokens}"
        )
