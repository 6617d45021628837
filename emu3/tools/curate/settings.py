"""What scores are measured by, and which of them keep an image or a clip."""

import hashlib
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self

from emu3.settings import Settings

Share = Annotated[float, Field(ge=0, le=1)]


class Range(Settings):
    """The values of a score that are kept, both ends included."""

    min: float | None = None
    max: float | None = None
    unless: "Filters" = Field(default_factory=dict)
    """A value outside is kept all the same if each of these scores is in its range."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min must be at most max ({self.max:g}), got {self.min:g}")
        return self


Filters = dict[str, Range]
"""Ranges by the name of their score."""
Range.model_rebuild()


class MeasureSettings(Settings):
    """What the scores depend on: a change measures every file again."""

    content_threshold: PositiveFloat = 27.0
    """Of PySceneDetect's ContentDetector: mean change of hue, saturation and luma at a cut."""
    fade_threshold: NonNegativeInt = 12
    """Of its ThresholdDetector: mean level below which a frame is black."""
    min_scene_frames: PositiveInt = 15
    longest: PositiveFloat = 20.0
    """Seconds of a clip; a longer scene becomes equal pieces, so of half of it at least."""
    short_edge: Annotated[int, Field(ge=64)] = 256
    """Pixels to which a frame is reduced before text, flow, damage and hash are measured."""
    text: bool = True
    """Whether text is searched for, which takes most of the time; if not, no range of it counts."""
    text_fps: PositiveFloat = 2.0
    text_score: Share = 0.8
    """Recognised text counts from this score on."""
    flow_fps: PositiveFloat = 8.0


class CaptionSettings(Settings):
    """What an endpoint of OpenAI's form is asked."""

    prompt: str = "Describe this in one paragraph, without an introduction."
    frames: PositiveInt = 8
    """Of a clip, evenly spaced."""
    long_edge: PositiveInt = 448
    """Pixels to which images are reduced."""
    video_part: Literal["images", "video"] = "images"
    """A clip as several ``image_url`` parts, or as vLLM's one ``video_url`` part of frames."""
    max_tokens: PositiveInt = 300
    temperature: NonNegativeFloat = 0.0
    concurrency: PositiveInt = 16
    """Requests of a process that are under way."""
    attempts: PositiveInt = 6
    """Of a request that is answered by 429, 500, 502, 503, 504 or not at all."""
    backoff: PositiveFloat = 1.0
    """Seconds before the second attempt, doubled before each further one."""
    timeout: PositiveFloat = 120.0
    """Seconds."""
    price_in: NonNegativeFloat = 0.0
    """Of a million prompt tokens, in any currency."""
    price_out: NonNegativeFloat = 0.0
    """Of a million generated tokens."""
    max_cost: PositiveFloat | None = None
    """In the same currency, over all runs; no request is sent that could exceed it."""

    @model_validator(mode="after")
    def _a_cap_has_prices(self) -> Self:
        if self.max_cost is not None and not self.price_in + self.price_out:
            raise ValueError("max_cost must come with price_in or price_out")
        return self


_SIZE = {"short_edge": Range(min=512), "aspect": Range(max=5)}
_CLIP = {
    "seconds": Range(min=2),
    "luma": Range(min=12),
    "text": Range(max=0.05),
    "flow": Range(min=0.003, max=0.10),
}


class CurateSettings(Settings):
    """All of ``emu3 curate``."""

    measure: MeasureSettings = MeasureSettings()
    images: Filters = Field(default_factory=lambda: dict(_SIZE))
    videos: Filters = Field(default_factory=lambda: _SIZE | _CLIP)
    duplicates: Annotated[int, Field(ge=-1, le=15)] = 4
    """Bits of 64 in which the hashes of duplicates differ at most; -1 keeps duplicates."""
    caption: CaptionSettings = CaptionSettings()

    def filters(self, kind: str) -> Filters:
        """The ranges of rows of this kind, ``image`` or ``clip``."""
        ranges = self.videos if kind == "clip" else self.images
        return {n: r for n, r in ranges.items() if self.measure.text or n != "text"}


def digest_of(*what: object) -> str:
    """16 hexadecimal digits of values that have a ``repr`` of their own."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
