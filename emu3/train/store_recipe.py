"""Settings of a decoder's training from token stores, on one process or many."""

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self

from emu3.config import OptimSettings, Recipe, TrainSettings
from emu3.data.stream import Rows, SourceSettings, StreamSettings
from emu3.settings import Settings
from emu3.train.layout import ParallelSettings
from emu3.train.lora import LoraSettings


class PretrainSettings(TrainSettings):
    """Length of the run, its start, devices, logging and checkpoints."""

    micro_batch_size: PositiveInt = 1
    """Rows of a data rank in one forward and backward pass; gradients are accumulated over those
    of a step."""
    z_loss: NonNegativeFloat = 0.0
    """Factor of the squared log-sum-exp of the logits."""
    start: Path | None = None
    """Weights to start from: a file, or a folder of shards, in the official layout or ours; None
    starts from random ones. ``max_position_embeddings`` may differ."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` is a GPU for each process of this machine, if there are any."""
    tf32: bool = True
    """Run float32 GEMMs of a GPU in TF32."""
    freeze: tuple[str, ...] = ()
    """Names of weights that are not trained; ``*`` is any part: ``embedding.*``, ``*.mlp.*``."""
    keep: PositiveInt = 2
    """Checkpoints that are kept, the last ones."""
    profile: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """First and last step of a trace by ``torch.profiler``, of the first rank."""

    @model_validator(mode="after")
    def _settings_apply(self) -> Self:
        if "vision_weight" in self.model_fields_set:
            raise ValueError("vision_weight of a stage that reads stores is data.vision_weight")
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile must be a first and a last step, got {self.profile}")
        return self


class PretrainOptimSettings(OptimSettings):
    """AdamW, and what it keeps of each weight: 16 bytes with its gradient, or less."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """``adamw8bit`` keeps its moments in 8 bits, by torchao: 2 bytes of a weight instead of 8."""
    master: Literal["float32", "stochastic"] = "float32"
    """The weights that are updated. ``stochastic``: those of bfloat16 that are computed with,
    rounded at random so that the mean of an update is exact; none in float32."""

    @property
    def is_compact(self) -> bool:
        """Whether an optimizer of torch does not do it."""
        return self.optimizer == "adamw8bit" or self.master == "stochastic"


class EvaluationSettings(Settings):
    """The validation loss, of rows that are the same each time."""

    sources: tuple[SourceSettings, ...] = ()
    """Stores that training does not read; none is no evaluation."""
    every: PositiveInt = 500
    """Steps; the last step is always evaluated."""
    rows: PositiveInt = 64

    @property
    def reads(self) -> dict[str, Any]:
        """What training's own settings of rows are changed by; empty without an evaluation."""
        return {"sources": self.sources} if self.sources else {}


class GuardSettings(Settings):
    """Steps that are skipped: weights and optimizer stay as they were."""

    spike: PositiveFloat | None = 10.0
    """Skip a step whose gradient norm is above this multiple of the running mean; None skips only
    those whose loss or norm is not finite."""
    decay: float = Field(0.99, gt=0, lt=1)
    """Of the running mean of the norms of steps that were not skipped."""
    warmup_steps: NonNegativeInt = 100
    """Steps before the first that may be a spike."""
    limit: PositiveInt = 5
    """Skipped steps in a row that end the run."""


class StoreRecipe(Recipe):
    """A training run of the decoder on token stores."""

    model_config = ConfigDict(title="recipe")

    train: PretrainSettings
    data: StreamSettings
    optim: PretrainOptimSettings = PretrainOptimSettings()
    parallel: ParallelSettings = ParallelSettings()
    lora: LoraSettings | None = None
    """Adapters, which alone are trained; None trains the weights."""
    evaluation: EvaluationSettings = EvaluationSettings()
    guard: GuardSettings = GuardSettings()

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        longest, context = self.model.max_position_embeddings, self.data.context
        if context > longest:
            raise ValueError(
                f"data.context ({context}) must be at most model.max_position_embeddings "
                f"({longest})"
            )
        if self.optim.master == "stochastic" and self.parallel.dtype != "bfloat16":
            raise ValueError(
                f"optim.master=stochastic needs parallel.dtype=bfloat16, got {self.parallel.dtype}"
            )
        ranks, at_once = self.parallel.replicate * self.parallel.shard, self.train.micro_batch_size
        rows = ("data.batch_size", self.data.batch_size), ("evaluation.rows", self.evaluation.rows)
        for name, size in rows if self.evaluation.reads else rows[:1]:
            if size % (ranks * at_once):
                raise ValueError(
                    f"{name} ({size}) must be a multiple of {ranks} data ranks x "
                    f"{at_once} train.micro_batch_size"
                )
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        if self.lora is None:
            return self
        if self.train.freeze:
            raise ValueError("train.freeze must be empty with lora, which freezes all weights")
        if self.optim.is_compact or self.parallel.offload:
            raise ValueError(
                "lora needs optim.optimizer=adamw, optim.master=float32 and "
                "parallel.offload=false: adapters are few, and float32"
            )
        if self.lora.dropout > 0 and self.parallel.tensor > 1:
            raise ValueError(
                f"lora.dropout must be 0 with parallel.tensor ({self.parallel.tensor}) above 1"
            )
        return self

    @property
    def num_micro_batches(self) -> int:
        """Of a data rank in a step."""
        ranks = self.parallel.replicate * self.parallel.shard
        return self.data.batch_size // (ranks * self.train.micro_batch_size)

    def rows(self) -> Rows | None:
        """Open what is read; None if a store is not there."""
        if not all(source.store.is_dir() for source in self.data.sources):
            return None
        return Rows(self.data, self.model.vocabulary, self.train.seed)

    def without_paths(self) -> Self:
        """Stores may have moved: their contents are compared."""
        moved = {"store": Path(), "scores": None}
        sources = tuple(s.model_copy(update=moved) for s in self.data.sources)
        return self.model_copy(update={"data": self.data.model_copy(update={"sources": sources})})
