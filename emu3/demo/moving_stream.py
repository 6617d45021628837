"""Endless batches of images, clips and questions; a restored stream continues bit for bit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from emu3.data.documents import Example, collate
from emu3.demo.config import ClipRecipe
from emu3.demo.digits import Digits
from emu3.demo.moving import Shown, render_clips, sample_colors, sample_directions
from emu3.demo.stream import DigitStream, DocumentStream
from emu3.prompt import Clip, Part, clip_prompt, document
from emu3.templates import Turn, chat_prompt
from emu3.text import TextTokenizer
from emu3.vision import VisionTokenizer
from emu3.vision.streaming import encode_pieces

ASKED = 2
"""Most questions of a document, different ones in any order."""
_AT_ONCE = 64
"""Clips in memory as pixels."""


def sample_clips(stream: DigitStream, recipe: ClipRecipe, count: int) -> tuple[Tensor, Shown]:
    """The next ``count`` clips ``[count, T, 3, H, W]`` of a stream."""
    chosen, generator = stream.choose(count)[0], stream.generator
    colors = sample_colors(count, recipe.clips, generator)
    directions = sample_directions(count, generator)
    clips = render_clips(chosen.scans, colors, directions, recipe.clips, stream.size)
    return clips, Shown(chosen.labels, colors, directions)


class MovingStream(DigitStream):
    """Images, and as many frames of clips as a frame of codes, for the vision tokenizer."""

    def __init__(self, digits: Digits, recipe: ClipRecipe) -> None:
        super().__init__(digits, recipe.data, recipe.vision.image_size, recipe.train.seed)
        self.recipe = recipe

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Images ``[B, 3, H, W]`` and pieces of clips ``[C, 4, 3, H, W]``."""
        images, span = self.sample()[0], self.recipe.vision.temporal_factor
        clips, _ = sample_clips(self, self.recipe, self.recipe.clips.batch_size)
        pieces = clips.unflatten(1, (-1, span))
        which = torch.randint(pieces.shape[1], (len(pieces),), generator=self.generator)
        return images, pieces[torch.arange(len(pieces)), which]


class MovingDocumentStream(DocumentStream):
    """Documents for the decoder, one kind a step, so that all have about the same length.

    Images and captions, as in ``DocumentStream``, alone for the first ``clips.after`` steps; then
    also a caption and its clip, and an image or a clip with one or two questions. Some clips come
    without their caption: for guidance, and to be continued. Clips are encoded once, at the start:
    that takes longer than a document's training.
    """

    def __init__(
        self, digits: Digits, recipe: ClipRecipe, tokenizer: VisionTokenizer, text: TextTokenizer
    ) -> None:
        super().__init__(digits, recipe, tokenizer, text)
        self.recipe = recipe
        self.steps = 0
        self.clips, self.shown = _encoded_clips(digits, recipe, tokenizer)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Ids ``[B, T]`` and their loss weights ``[B, T]``."""
        clips = self.recipe.clips
        self.steps += 1
        if self.steps <= clips.after:
            return super().next_batch()
        kind = torch.rand((), generator=self.generator).item()
        if kind < clips.share:
            examples = self._clip_examples()
        elif kind < clips.share + clips.questions:
            examples = self._question_examples()
        else:
            return super().next_batch()
        return collate(examples, self.text.vocabulary, self.vision_weight)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "steps": torch.tensor(self.steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.steps = int(state["steps"])

    def _clip_examples(self) -> list[Example]:
        clips, shown = self._choose_clips()
        silent = torch.rand(len(clips), generator=self.generator) < self.recipe.clips.null_caption
        return [
            clip_example("" if silent[number] else shown.caption(number), clip, self.text)
            for number, clip in enumerate(clips)
        ]

    def _question_examples(self) -> list[Example]:
        of_image = torch.rand((), generator=self.generator).item() < 0.5
        parts, shown = self._choose_images() if of_image else self._choose_clips()
        order = torch.rand(len(parts), len(shown.questions), generator=self.generator).argsort(1)
        many = torch.randint(1, ASKED + 1, (len(parts),), generator=self.generator)
        examples = []
        for number, part in enumerate(parts):
            asked = [shown.questions[i] for i in order[number, : many[number]].tolist()]
            answers = [shown.answer(number, question) for question in asked]
            examples.append(question_example(part, asked, answers, self.text))
        return examples

    def _choose_images(self) -> tuple[list[Tensor], Shown]:
        images, labels, colors = self.sample()
        return list(self.tokenizer.encode(images)), Shown(labels, colors)

    def _choose_clips(self) -> tuple[list[Clip], Shown]:
        count = self.settings.batch_size
        which = torch.randint(len(self.clips), (count,), generator=self.generator)
        return [self.clips[i] for i in which.tolist()], Shown(*(part[which] for part in self.shown))


def _encoded_clips(
    digits: Digits, recipe: ClipRecipe, tokenizer: VisionTokenizer
) -> tuple[list[Clip], Shown]:
    """The clips of all documents; they depend on the recipe's seed and the tokenizer alone."""
    stream = DigitStream(digits, recipe.data, tokenizer.settings.image_size, recipe.train.seed)
    clips, shown = [], []
    for start in range(0, recipe.clips.encoded, _AT_ONCE):
        count = min(_AT_ONCE, recipe.clips.encoded - start)
        pixels, contents = sample_clips(stream, recipe, count)
        clips += encoded(pixels, recipe, tokenizer)
        shown.append(contents)
    return clips, Shown(*(torch.cat(parts) for parts in zip(*shown, strict=True)))


def encoded(clips: Tensor, recipe: ClipRecipe, tokenizer: VisionTokenizer) -> list[Clip]:
    """Clips ``[n, T, 3, H, W]``, each frame of codes encoded by itself."""
    (codes,) = encode_pieces(tokenizer, [clips])
    fps, span = recipe.clips.rate, recipe.vision.temporal_factor
    return [Clip(one, fps, span) for one in codes]


def clip_example(caption: str, clip: Clip, text: TextTokenizer) -> Example:
    """``BOS caption clip EOS``, trained on what follows ``img_token``."""
    frames, *grid = clip.codes.shape
    opening = clip_prompt((*grid,), frames, clip.fps, text, clip.span)
    start = 1 + len(text.encode(caption)) + len(opening)
    return Example(document([caption, clip], text), start)


def question_example(
    part: Part, questions: Sequence[str], answers: Sequence[str], text: TextTokenizer
) -> Example:
    """The conversation of ``emu3 chat``, one question a turn; it is trained on the answers.

    EOS follows the last answer. The template's space after the others is not learned: it would
    teach the model not to end an answer.
    """
    said = [[part, questions[0]], *([question] for question in questions[1:])]
    turns, ends, begins = [], [], []
    for words, answer in zip(said, answers, strict=True):
        begins.append(len(chat_prompt([*turns, Turn(words)], text)))
        ends.append(begins[-1] + len(text.encode(f" {answer}")))
        turns.append(Turn(words, answer))
    prompt = chat_prompt([*turns[:-1], Turn(said[-1])], text)
    ids = [*prompt, *text.encode(f" {answers[-1]}"), text.vocabulary.eos]
    return Example(ids, begins[0], [range(*gap) for gap in zip(ends, begins[1:], strict=False)])
