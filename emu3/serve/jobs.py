"""Requests as jobs of the engine: images from a prompt, and answers to a conversation."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from emu3.generate import Batch, Generation
from emu3.generate.text import Pieces
from emu3.serve.engine import Job
from emu3.serve.media import Pixels
from emu3.serve.requests import ImageEvent, TextEvent
from emu3.text import TextTokenizer
from emu3.tools.draw import picture
from emu3.vision import VisionTokenizer


class ImageJob(Job):
    """Images of one prompt; previews are decoded where a row of codes ends."""

    def __init__(
        self, generations: Sequence[Generation], vision: VisionTokenizer, previews: int
    ) -> None:
        super().__init__(len(generations[0].prompts))
        self.generations, self.vision = generations, vision
        height, width = generations[0].grid
        stops = (round(height * i / (previews + 1)) for i in range(1, previews + 1))
        self._previews = {
            rows * width: number
            for number, rows in enumerate(sorted({one for one in stops if 0 < one < height}))
        }
        """The number of the preview for each count of codes that has one."""

    def prepare(self) -> Sequence[Generation]:
        return self.generations

    def grown(self, generation: Generation, batch: Batch) -> None:
        number = self._previews.get(generation.place)
        if number is not None:
            self._show(generation, batch.drawn(generation), number)

    def ended(self, generation: Generation) -> None:
        self._show(generation, generation.codes, None)

    def _show(self, generation: Generation, codes: Tensor, preview: int | None) -> None:
        levels = picture(self.vision, codes, generation.grid)
        image = Image.fromarray(levels.permute(1, 2, 0).numpy())
        index = self.generations.index(generation)
        self.tell(ImageEvent(index, generation.seed, image, preview))


class ChatJob(Job):
    """One answer; images and clips of the prompt are encoded when the job begins.

    Args:
        media: pixels, in their order.
        vision: encodes them.
        text: decodes the answer.
        begin: from the codes of the media to the generation.
        prompt_tokens: tokens of the prompt.
    """

    def __init__(
        self,
        media: Sequence[Pixels],
        vision: VisionTokenizer,
        text: TextTokenizer,
        begin: Callable[[Sequence[Tensor]], Generation],
        prompt_tokens: int,
    ) -> None:
        super().__init__(1)
        self.media, self.vision, self.begin = media, vision, begin
        self.prompt_tokens = prompt_tokens
        self._pieces = Pieces(text)

    @torch.no_grad()
    def prepare(self) -> Sequence[Generation]:
        return [self.begin([one.encode(self.vision).cpu() for one in self.media])]

    def grown(self, generation: Generation, batch: Batch) -> None:
        if piece := self._pieces.next(generation.ids):
            self.tell(TextEvent(piece, tokens=len(generation.ids)))

    def ended(self, generation: Generation) -> None:
        ids = generation.ids
        reason = "length" if len(ids) == generation.length else "stop"
        self.tell(TextEvent(self._pieces.next(ids, is_last=True), reason, len(ids)))
