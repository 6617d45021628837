"""What the HTTP routes and the page call: requests in, events out as they come.

    async with await service.images(ImageRequest(prompt="a red seven")) as events:
        async for event in events:
            ...

Leaving the block cancels the request.
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from typing_extensions import Self

from emu3.generate import Batch, Generation, Sampling
from emu3.generate.batch import GREEDY, SPARE
from emu3.generate.common import uses_graph
from emu3.prompt import Clip, generation_prompt
from emu3.serve.engine import Engine
from emu3.serve.jobs import ChatJob, ImageJob
from emu3.serve.media import Pixels, read_media
from emu3.serve.requests import ChatRequest, ImageRequest, Message, TextPart
from emu3.templates import NEGATIVE, POSITIVE, SYSTEM, Turn, chat_prompt, grid_of
from emu3.tools.look import is_published
from emu3.vision.images import WIDEST_ASPECT
from emu3.weights import Pretrained


@dataclass(frozen=True)
class Limits:
    """What one request may have, and how many wait."""

    batch: int = 16
    """Rows that decode together: a guided image takes two, an answer one."""
    queue: int = 64
    """Requests that wait."""
    context: int = 16384
    """Tokens of a row, at most those of the model; all rows are allocated at the start."""
    body: int = 32 << 20
    """Bytes of a request."""
    prompt: int = 8192
    """Characters of a prompt, or of all messages."""
    images: int = 10
    """Images that are generated, or images and videos that are sent."""
    pixels: int = 50_000_000
    """Of an image that is sent."""
    frames: int = 128
    """Of a video that is sent."""


class NotFoundError(LookupError):
    """A model that is not served here."""


class Service:
    """Generates images and answers with one model.

    Args:
        loaded: the model, on its device.
        name: of the model.
        limits: of a request and of all.
    """

    def __init__(self, loaded: Pretrained, name: str, limits: Limits = Limits()) -> None:
        self.loaded, self.name, self.limits = loaded, name, limits
        model = loaded.model
        self.is_published = is_published(loaded)
        self.context = min(limits.context, model.settings.max_position_embeddings)
        graph, ids = uses_graph(model, None), loaded.text.vocabulary
        batch = Batch(model, ids, limits.batch, self.context, graph=graph)
        self.engine = Engine(batch, limits.queue)

    def __enter__(self) -> Self:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.abort()
        self.engine.join()

    async def images(self, request: ImageRequest) -> ImageJob:
        """An asynchronous iterator over :class:`ImageEvent`.

        Raises:
            ValueError: one line, for what cannot be generated.
            NotFoundError: another model is asked for.
            BusyError, DrainingError: of :meth:`Engine.submit`.
        """
        self.check_model(request.model)
        _check(len(request.prompt), self.limits.prompt, "prompt", "characters")
        _check(request.n, self.limits.images, "n", "images")
        if not request.prompt.strip():
            raise ValueError("prompt: must not be empty")
        grid, text = self.grid(request), self.loaded.text
        negative, positive = (NEGATIVE, POSITIVE) if self.is_published else ("", "")
        negative = negative if request.negative is None else request.negative
        positive = positive if request.positive is None else request.positive
        how = Sampling(request.guidance, request.top_k, request.top_p, request.temperature)
        words = [request.prompt + positive, *[negative] * (request.guidance != 1)]
        prompts = [generation_prompt(one, grid, text) for one in words]
        seed = _random_seed() if request.seed is None else request.seed
        generations = [
            Generation(prompts, prod(grid), grid, how, (seed + i) % 2**64) for i in range(request.n)
        ]
        self._check_room(generations[0].capacity, "prompt and image")
        job = ImageJob(generations, self.loaded.vision, request.partial_images)
        self.engine.submit(job)
        return job

    async def chat(self, request: ChatRequest) -> ChatJob:
        """An asynchronous iterator over :class:`TextEvent`; the errors are those of ``images``."""
        self.check_model(request.model)
        self.engine.check_open()
        vision, messages = self.loaded.vision, request.messages
        pixels = await self._media(request)
        # How many codes there will be is known already.
        empty = [torch.zeros(one.shape(vision), dtype=torch.int64) for one in pixels]
        num_tokens = len(self._chat_prompt(messages, pixels, empty))
        fits = self.context - SPARE + 1 - num_tokens
        asked = request.max_completion_tokens or request.max_tokens
        length = asked or max(1, min(1024, fits))
        self._check_room(num_tokens + length - 1, "messages and answer")
        how = GREEDY
        if request.temperature > 0:
            how = Sampling(1, request.top_k, request.top_p, request.temperature)
        seed = _random_seed() if request.seed is None else request.seed

        def begin(codes: Sequence[Tensor]) -> Generation:
            return Generation([self._chat_prompt(messages, pixels, codes)], length, None, how, seed)

        job = ChatJob(pixels, vision, self.loaded.text, begin, num_tokens)
        self.engine.submit(job)
        return job

    async def _media(self, request: ChatRequest) -> list[Pixels]:
        parts = [part for message in request.messages for part in message.content]
        words = sum(len(part.text) for part in parts if isinstance(part, TextPart))
        _check(words, self.limits.prompt, "messages", "characters")
        media = [part for part in parts if not isinstance(part, TextPart)]
        _check(len(media), self.limits.images, "messages", "images and videos")
        vision = self.loaded.vision
        return await asyncio.to_thread(
            read_media,
            media,
            vision,
            size=None if self.is_published else vision.settings.image_size,
            fps=request.fps,
            max_pixels=self.limits.pixels,
            max_frames=self.limits.frames,
        )

    def grid(self, request: ImageRequest) -> tuple[int, int]:
        """Rows and columns of codes of the images that are asked for."""
        settings = self.loaded.vision.settings
        factor, side = settings.spatial_factor, settings.image_size
        if request.size != "auto":
            if request.ratio is not None or request.area is not None:
                raise ValueError("size: must be auto beside ratio or area")
            return _grid_of_size(request.size, factor)
        area = request.area or (720 * 720 if self.is_published else side * side)
        return grid_of(request.ratio or "1:1", area, factor)

    def _chat_prompt(
        self, messages: Sequence[Message], pixels: Sequence[Pixels], codes: Sequence[Tensor]
    ) -> list[int]:
        vision = self.loaded.vision
        media = iter([one.part(of, vision) for one, of in zip(pixels, codes, strict=True)])
        system, turns, said = "", [], []
        for message in messages:
            parts: list[str | Tensor | Clip] = [
                part.text if isinstance(part, TextPart) else next(media) for part in message.content
            ]
            if message.role == "user":
                said += parts
                continue
            if not all(isinstance(part, str) for part in parts):
                raise ValueError(f"messages: what the {message.role} says must be text")
            if message.role == "assistant":
                turns.append(Turn(said, "".join(parts)))
                said = []
            elif turns or said:
                raise ValueError("messages: what the system says must come first")
            else:
                system += "".join(parts).strip() + " "
        if messages[-1].role != "user":
            raise ValueError(f"messages: the last must be the user's, got {messages[-1].role}")
        return chat_prompt([*turns, Turn(said)], self.loaded.text, system or SYSTEM)

    def check_model(self, name: str | None) -> None:
        """Raise :class:`NotFoundError` for another model than this one."""
        if name not in (None, self.name):
            raise NotFoundError(f"model: {name!r} is not served here, {self.name!r} is")

    def _check_room(self, needed: int, what: str) -> None:
        if needed > self.context - SPARE:
            raise ValueError(
                f"{what} may have {self.context - SPARE} tokens together, got {needed}"
            )


def _check(got: int, most: int, name: str, unit: str) -> None:
    if got > most:
        raise ValueError(f"{name}: may have {most} {unit}, got {got}")


def _random_seed() -> int:
    """Of 32 bits, which every client's numbers can hold."""
    return secrets.randbits(32)


def _grid_of_size(size: str, factor: int) -> tuple[int, int]:
    sides = size.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and len(side) < 6 for side in sides):
        raise ValueError(f'size: must be "auto" or "WIDTHxHEIGHT" in pixels, got {size[:40]!r}')
    width, height = map(int, sides)
    if width % factor or height % factor or not (width and height):
        raise ValueError(f"size: sides must be multiples of {factor} pixels, got {size}")
    if max(width, height) > WIDEST_ASPECT * min(width, height):
        raise ValueError(f"size: a side may be {WIDEST_ASPECT} times the other, got {size}")
    return height // factor, width // factor
