"""Settings of a decoder's training on preference pairs, on one process or many."""

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self

from emu3.data.pair_stream import PairRows, PairSettings
from emu3.settings import Settings
from emu3.train.store_recipe import StoreRecipe


class PreferenceSettings(Settings):
    """The loss of a pair: that of ``emu3_kernels.preference_loss``, and next-token prediction."""

    kind: Literal["dpo", "ipo", "simpo"] = "dpo"
    beta: PositiveFloat = 0.1
    margin: NonNegativeFloat = 0.0
    """In nats after ``beta``, by which a chosen image is to be ahead; not of IPO."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs whose order is taken to be wrong; not of IPO."""
    normalize: Literal["sum", "mean"] = "sum"
    """Compare log-probabilities of images, or their means per token, as IPO and SimPO are defined:
    ``beta`` of a mean over 4,096 codes is 4,096 times that of a sum."""
    ntp_weight: NonNegativeFloat = 1.0
    """Factor of the mean next-token loss of the visual tokens of chosen images."""

    @model_validator(mode="after")
    def _kind_takes_them(self) -> Self:
        if self.kind == "ipo" and (self.margin or self.label_smoothing):
            raise ValueError("ipo must be without margin and label_smoothing")
        return self

    @property
    def needs_reference(self) -> bool:
        return self.kind != "simpo"


class PairEvaluationSettings(Settings):
    """The validation loss, of pairs that are the same each time."""

    pairs: Path | None = None
    """Pairs that training does not read; None is no evaluation."""
    every: PositiveInt = 100
    """Steps; the last step is always evaluated."""
    rows: PositiveInt = 64

    @property
    def reads(self) -> dict[str, Any]:
        return {} if self.pairs is None else {"pairs": self.pairs}


class PreferenceRecipe(StoreRecipe):
    """A training run of the decoder on preference pairs."""

    model_config = ConfigDict(title="recipe")

    data: PairSettings
    evaluation: PairEvaluationSettings = PairEvaluationSettings()
    preference: PreferenceSettings = PreferenceSettings()

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        if self.train.z_loss:
            raise ValueError("train.z_loss must be 0 with pairs: it is no log-probability")
        return self

    def rows(self) -> PairRows | None:
        """Open what is read; None if the pairs are not there."""
        if not self.data.pairs.exists():
            return None
        return PairRows(self.data, self.model.vocabulary, self.train.seed)

    def without_paths(self) -> Self:
        """Pairs may have moved: their contents are compared."""
        data = self.data.model_copy(update={"pairs": Path()})
        return self.model_copy(update={"data": data})
