"""The metrics of clips and questions, by the judges of ``emu3.demo.judge``."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emu3.demo.config import ClipRecipe
from emu3.demo.digits import DIGITS, Digits
from emu3.demo.judge import DigitJudge, judge_color, judge_direction
from emu3.demo.measure import share
from emu3.demo.miniature import Miniature
from emu3.demo.moving import (
    DIRECTIONS,
    Shown,
    clip_colors,
    render_clips,
    sample_colors,
    sample_directions,
)
from emu3.demo.moving_stream import encoded
from emu3.generate import Sampling, generate_clips, generate_text
from emu3.prompt import Part
from emu3.templates import Turn, chat_prompt
from emu3.vision import VisionTokenizer
from emu3.vision.streaming import decode_pieces

_GENERATE = Sampling(guidance=3.0, temperature=0.5)
"""A clip has three times an image's codes, each of which can be a mistake."""
_CONTINUE = Sampling(guidance=1.0, temperature=0.5)
"""Without a caption there is nothing to guide."""
_LONGEST_ANSWER = 12
_ROUNDS = 2


@dataclass(frozen=True)
class Clips:
    """Clips ``[n, T, 3, H, W]``, what they should show, and which of them do."""

    pixels: Tensor
    shown: Shown
    digit_right: Tensor
    color_right: Tensor
    direction_right: Tensor

    def accuracies(self, name: str) -> dict[str, float]:
        return {
            f"{name}_digit_accuracy": share(self.digit_right),
            f"{name}_color_accuracy": share(self.color_right),
            f"{name}_direction_accuracy": share(self.direction_right),
        }


def judged(pixels: Tensor, shown: Shown, judge: DigitJudge, since: int = 0) -> Clips:
    """Judge clips by their frames from ``since`` on, the direction also by the one before."""
    frames = pixels[:, since:]
    return Clips(
        pixels,
        shown,
        judge.of_clips(frames) == shown.digits,
        judge_color(frames[:, frames.shape[1] // 2]) == shown.colors,
        judge_direction(pixels[:, max(0, since - 1) :]) == shown.directions,
    )


def film_validation(validation_set: Digits, recipe: ClipRecipe, size: int) -> tuple[Tensor, Shown]:
    """A clip of each validation digit in a random colour and direction: pixels and contents."""
    generator, count = torch.Generator().manual_seed(2), len(validation_set)
    colors = sample_colors(count, recipe.clips, generator)
    directions = sample_directions(count, generator)
    clips = render_clips(validation_set.scans, colors, directions, recipe.clips, size)
    return clips, Shown(validation_set.labels, colors, directions)


def measure_clips(mini: Miniature, judge: DigitJudge) -> Clips:
    """Generate every digit in every direction and colour of clips, twice, from its caption."""
    settings = mini.recipe.clips
    ranges = (
        torch.arange(_ROUNDS),
        clip_colors(settings),
        torch.arange(len(DIGITS)),
        torch.arange(len(DIRECTIONS)),
    )
    _, colors, digits, directions = torch.cartesian_prod(*ranges).unbind(1)
    shown = Shown(digits, colors, directions)
    captions = [shown.caption(number) for number in range(len(digits))]
    span = mini.tokenizer.settings.temporal_factor
    shape = settings.frames // span, *mini.tokenizer.settings.grid
    codes = generate_clips(
        mini.model, mini.text, captions, shape, settings.rate, _GENERATE, span=span
    )
    return judged(decode_clips(mini.tokenizer, codes), shown, judge)


def measure_continued(mini: Miniature, judge: DigitJudge, codes: Tensor, shown: Shown) -> Clips:
    """Generate the last frame of codes of each of ``codes [n, t, h, w]`` without a caption.

    Digit and colour are those of the generated frames; the direction is that in which they leave
    the last given frame.
    """
    span, known = mini.tokenizer.settings.temporal_factor, codes.shape[1] - 1
    continued = generate_clips(
        mini.model,
        mini.text,
        [""] * len(codes),
        tuple(codes.shape[1:]),
        mini.recipe.clips.rate,
        _CONTINUE,
        given=codes[:, :known],
        span=span,
    )
    return judged(decode_clips(mini.tokenizer, continued), shown, judge, since=known * span)


def measure_answers(mini: Miniature, parts: Sequence[Part], shown: Shown) -> dict[str, float]:
    """Ask every question about every image or clip; the share of right answers to each."""
    accuracies = {}
    for question in shown.questions:
        prompts = [chat_prompt([Turn([part, question])], mini.text) for part in parts]
        answers = generate_text(mini.model, mini.text, prompts, _LONGEST_ANSWER)
        right = [
            answer.strip() == shown.answer(number, question)
            for number, answer in enumerate(answers)
        ]
        accuracies[question] = share(torch.tensor(right))
    return accuracies


def decode_clips(tokenizer: VisionTokenizer, codes: Tensor) -> Tensor:
    """Pixels ``[n, T, 3, H, W]`` in [-1, 1], each frame of codes decoded by itself."""
    (pixels,) = decode_pieces(tokenizer, [codes])
    return pixels.clamp(-1, 1)


def encode_clips(tokenizer: VisionTokenizer, recipe: ClipRecipe, clips: Tensor) -> Tensor:
    """Codes ``[n, t, h, w]``, each frame of codes encoded by itself."""
    return torch.stack([clip.codes for clip in encoded(clips, recipe, tokenizer)])
