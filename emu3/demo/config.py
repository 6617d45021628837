"""Settings of the digits: what ``Recipe`` gains for the miniature's two stages."""

from pathlib import Path

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveInt

from emu3.config import Recipe
from emu3.settings import Settings


class DigitSettings(Settings):
    """The handwritten digits, and how far each sample is moved."""

    validation: float = Field(0.25, gt=0, lt=1)
    """Share of the digits that is kept for validation, unseen by every stage."""
    batch_size: PositiveInt = 64
    describe: float = Field(0.6, ge=0, le=1)
    """Share of the documents in which the caption follows the image."""
    null_caption: float = Field(0.1, ge=0, le=1)
    """Share of the images to generate that come without a caption, for guidance."""
    shift: NonNegativeFloat = 0.02
    """Largest shift, as a share of the image."""
    rotate: NonNegativeFloat = 4.0
    """Largest rotation in degrees."""
    scale: float = Field(0.04, ge=0, lt=1)
    """Largest relative change of size."""
    tokenizer: Path | None = None
    """Trained vision tokenizer; the decoder's stage reads it."""


class DigitRecipe(Recipe):
    """A training run on digits."""

    model_config = ConfigDict(title="recipe")

    data: DigitSettings = DigitSettings()
