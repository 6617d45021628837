"""Settings of the digits: what ``Recipe`` gains for the miniature's two stages."""

from fractions import Fraction
from pathlib import Path

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self

from emu3.config import Recipe
from emu3.settings import Settings

SIDE = 0.88
"""Of a digit as a share of the image's: scans touch their border, and the motion needs a margin."""


class DigitSettings(Settings):
    """The handwritten digits, and how far each sample is moved."""

    validation: float = Field(0.25, gt=0, lt=1)
    """Share of the digits that is kept for validation, unseen by every stage."""
    batch_size: PositiveInt = 64
    describe: float = Field(0.6, ge=0, le=1)
    """Share of the documents in which the caption follows the image."""
    null_caption: float = Field(0.1, ge=0, le=1)
    """Share of the images to generate that come without a caption, for guidance."""
    side: float = Field(SIDE, gt=0, le=1)
    """Side of a digit as a share of the image's."""
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


class ClipSettings(Settings):
    """Clips of moving digits, and questions."""

    frames: PositiveInt = 12
    """Frames of pixels of a clip."""
    fps: PositiveInt = 8
    """Frames of pixels a second."""
    travel: float = Field(3 / 16, gt=0, lt=0.5)
    """How far a digit moves in the time of a clip, as a share of the frame."""
    colors: int = Field(4, ge=1, le=8)
    """Colours of clips, spread over the palette."""
    batch_size: PositiveInt = 24
    """Clips in a step of the vision tokenizer, of one frame of codes each."""
    encoded: PositiveInt = 4800
    """Clips that are encoded before the decoder's first step; its documents hold these."""
    after: NonNegativeInt = 0
    """The decoder's steps on images and captions alone, before its first clip or question."""
    share: float = Field(0.5, ge=0, le=1)
    """Share of the decoder's other steps on clips."""
    null_caption: float = Field(0.25, ge=0, le=1)
    """Share of the clips that come without a caption: for guidance, and to be continued."""
    questions: float = Field(0.2, ge=0, le=1)
    """Share of the decoder's other steps on questions."""

    @property
    def rate(self) -> Fraction:
        """``fps`` as the prompt takes it."""
        return Fraction(self.fps)

    @property
    def side(self) -> float:
        """Side of a digit as a share of the frame's: it stays inside, whatever its direction."""
        return 1 - 2 * self.travel


class ClipRecipe(DigitRecipe):
    """A training run on digits and clips of them."""

    clips: ClipSettings = ClipSettings()

    @model_validator(mode="after")
    def _frames_fit(self) -> Self:
        span = self.vision.temporal_factor
        if span == 1:
            raise ValueError("vision.temporal_factor must be above 1 for clips, got 1")
        if self.clips.frames % span or self.clips.frames == span:
            raise ValueError(
                f"clips.frames ({self.clips.frames}) must be a multiple of temporal_factor "
                f"({span}), and {2 * span} at least, to be continued"
            )
        if self.clips.share + self.clips.questions > 1:
            raise ValueError(
                f"clips.share ({self.clips.share}) and clips.questions ({self.clips.questions}) "
                "must be at most 1 together"
            )
        return self
