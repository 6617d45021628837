"""What a request may say, and what is told of it: OpenAI's fields, and Emu3's own beside them."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, field_validator

from emu3.settings import Settings

Seed = Annotated[int, Field(ge=0, lt=2**64)]
Share = Annotated[float, Field(gt=0, le=1)]


class ImageRequest(Settings, title="a request for images"):
    """Images of one prompt; image i of n has the seed ``seed + i``."""

    prompt: str
    model: str | None = None
    n: PositiveInt = 1
    size: str = "auto"
    """``"WIDTHxHEIGHT"`` in pixels; ``"auto"`` follows ratio and area."""
    ratio: str | None = None
    """``"width:height"``; square by default."""
    area: PositiveInt | None = None
    """Pixels, about; by default what the model was trained for."""
    seed: Seed | None = None
    """None draws one."""
    guidance: Annotated[float, Field(ge=0)] = 3.0
    top_k: PositiveInt | None = 2048
    top_p: Share | None = None
    temperature: PositiveFloat = 1.0
    negative: str | None = None
    """The negative prompt; None takes the model's own."""
    positive: str | None = None
    """Words after the prompt; None takes the model's own."""
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] = "png"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=16)] = 0
    """Previews of each image while it grows, of a streamed response."""
    user: str | None = None


class _Url(BaseModel):
    url: str


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: _Url


class VideoPart(BaseModel):
    type: Literal["video_url"]
    video_url: _Url


ContentPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(BaseModel):
    """One message; what OpenAI's clients add to it is passed over."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[ContentPart]

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(Settings, title="stream_options"):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(Settings, title="a chat request"):
    """A conversation whose last message is the user's; greedy unless a temperature is given."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    """The same by its newer name; by default 1,024, or what fits."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Share | None = None
    top_k: PositiveInt | None = None
    seed: Seed | None = None
    fps: PositiveFloat | None = None
    """Frames a second that are taken of a video; None takes all."""
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None


@dataclass(frozen=True)
class ImageEvent:
    """An image of a request, finished or while it grows."""

    index: int
    """Which of the n images."""
    seed: int
    image: Image.Image
    """Of a preview, rows that are not generated yet are grey."""
    preview: int | None
    """The number of the preview; None is the finished image."""


@dataclass(frozen=True)
class TextEvent:
    """The next piece of an answer; the last one has the reason."""

    text: str
    finish_reason: Literal["stop", "length"] | None = None
    tokens: int = 0
    """Generated so far."""
