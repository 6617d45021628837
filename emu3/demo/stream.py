"""Endless batches of digits; a restored stream continues bit for bit."""

import torch
from torch import Tensor

from emu3.data.documents import Example, collate
from emu3.demo.config import DigitRecipe, DigitSettings
from emu3.demo.digits import COLORS, Digits, caption, load_split, render, sample_motion
from emu3.prompt import (
    generation_document,
    generation_prompt,
    understanding_document,
    understanding_prompt,
)
from emu3.text import TextTokenizer
from emu3.vision import VisionTokenizer


class DigitStream:
    """Shuffled epochs of digits, each sample in a random colour and slightly moved.

    One generator decides the order, the colours and the motion; with the rest of the epoch
    it is the whole state.
    """

    def __init__(self, digits: Digits, settings: DigitSettings, size: int, seed: int) -> None:
        if settings.batch_size > len(digits):
            raise ValueError(
                f"data.batch_size must be at most the {len(digits)} digits to train on, "
                f"got {settings.batch_size}"
            )
        self.digits, self.settings, self.size = digits, settings, size
        self.generator = torch.Generator().manual_seed(seed)
        self.rest = torch.empty(0, dtype=torch.int64)

    def sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """Next batch: images ``[B, 3, H, W]``, digits ``[B]``, colours ``[B]``."""
        chosen, colors, motion = self.choose(self.settings.batch_size)
        return render(chosen.scans, colors, motion, self.size), chosen.labels, colors

    def choose(self, count: int) -> tuple[Digits, Tensor, Tensor]:
        """Next ``count`` digits, colours ``[count]`` and affine maps ``[count, 2, 3]``."""
        while len(self.rest) < count:
            epoch = torch.randperm(len(self.digits), generator=self.generator)
            self.rest = torch.cat((self.rest, epoch))
        index, self.rest = self.rest[:count], self.rest[count:]
        colors = torch.randint(len(COLORS), (count,), generator=self.generator)
        return self.digits[index], colors, sample_motion(count, self.settings, self.generator)

    def state(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state(), "rest": self.rest.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])
        self.rest = state["rest"].clone()


class ImageStream(DigitStream):
    """Images alone, for the vision tokenizer."""

    def next_batch(self) -> tuple[Tensor]:
        return (self.sample()[0],)


class DocumentStream(DigitStream):
    """Documents for the decoder: caption before image, or image before caption.

    Only the second part has a loss, as in Emu3's fine-tuning. Some images come without their
    caption: the unconditional branch of classifier-free guidance.
    """

    def __init__(
        self, digits: Digits, recipe: DigitRecipe, tokenizer: VisionTokenizer, text: TextTokenizer
    ) -> None:
        size = tokenizer.settings.image_size
        super().__init__(digits, recipe.data, size, recipe.train.seed)
        self.tokenizer, self.text = tokenizer, text
        self.vision_weight = recipe.train.vision_weight

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Ids ``[B, T]`` and their loss weights ``[B, T]``."""
        images, labels, colors = self.sample()
        describe, silent = torch.rand(2, len(labels), generator=self.generator)
        examples = []
        for number, codes in enumerate(self.tokenizer.encode(images)):
            words = caption(int(labels[number]), int(colors[number]))
            if describe[number] < self.settings.describe:
                start = len(understanding_prompt(codes, self.text))
                examples.append(Example(understanding_document(codes, words, self.text), start))
            else:
                words = "" if silent[number] < self.settings.null_caption else words
                start = len(generation_prompt(words, tuple(codes.shape), self.text))
                examples.append(Example(generation_document(words, codes, self.text), start))
        return collate(examples, self.text.vocabulary, self.vision_weight)


def training_digits(settings: DigitSettings) -> Digits:
    """The training digits."""
    return load_split(settings.validation)[0]
