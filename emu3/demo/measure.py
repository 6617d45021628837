"""The demo's metrics: accuracies by independent judges, and the speed of the fused ops."""

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

import emu3_kernels
from emu3.demo.config import SIDE
from emu3.demo.digits import COLORS, DIGITS, Digits, at_rest, caption, read_caption, render
from emu3.demo.judge import DigitJudge, judge_color
from emu3.generate import Sampling, generate_captions, generate_images
from emu3.model import Emu3
from emu3.text import TextTokenizer
from emu3.timing import seconds_of
from emu3.vision import VisionTokenizer

SAMPLING = Sampling(guidance=2.0, temperature=0.8)
"""Guidance and temperature below Emu3's 3 and 1: a small model's unlikely codes are mistakes."""


@dataclass(frozen=True)
class Generated:
    """Images generated from captions, ``[round, colour, digit, 3, H, W]``, and their accuracies."""

    images: Tensor
    digit_accuracy: float
    color_accuracy: float
    num_tokens: int


@dataclass(frozen=True)
class Captioned:
    """Captions of validation images, and their accuracies."""

    images: Tensor
    captions: list[str]
    digit_right: Tensor
    digit_accuracy: float
    color_accuracy: float


def measure_generation(
    model: Emu3,
    tokenizer: VisionTokenizer,
    text: TextTokenizer,
    judge: DigitJudge,
    *,
    rounds: int,
    how: Sampling = SAMPLING,
) -> Generated:
    """Generate every digit in every colour ``rounds`` times; the judges' accuracies."""
    digits, colors, captions = every_caption(rounds)
    codes = generate_images(model, text, captions, tokenizer.settings.grid, how)
    images = tokenizer.decode(codes).clamp(-1, 1)
    return Generated(
        images.unflatten(0, (rounds, len(COLORS), len(DIGITS))),
        share(judge(images) == digits),
        share(judge_color(images) == colors),
        codes.numel(),
    )


def every_caption(rounds: int) -> tuple[Tensor, Tensor, list[str]]:
    """Each digit in each colour ``rounds`` times: digits ``[n]``, colours ``[n]``, captions."""
    color, digit = torch.meshgrid(
        torch.arange(len(COLORS)), torch.arange(len(DIGITS)), indexing="ij"
    )
    digits, colors = digit.flatten().repeat(rounds), color.flatten().repeat(rounds)
    return digits, colors, [caption(int(d), int(c)) for d, c in zip(digits, colors, strict=True)]


def paint_validation(
    validation_set: Digits, size: int, side: float = SIDE
) -> tuple[Tensor, Tensor]:
    """Each validation digit once, unmoved, in a random colour: the images and the colours."""
    generator = torch.Generator().manual_seed(1)
    colors = torch.randint(len(COLORS), (len(validation_set),), generator=generator)
    return render(validation_set.scans, colors, at_rest(len(colors), side), size), colors


def measure_captions(
    model: Emu3,
    tokenizer: VisionTokenizer,
    text: TextTokenizer,
    images: Tensor,
    labels: Tensor,
    colors: Tensor,
) -> Captioned:
    """Caption ``images`` and compare the captions with the labels and colours."""
    captions = generate_captions(model, text, tokenizer.encode(images), max_new_tokens=24)
    read = [read_caption(words) for words in captions]
    digit_right = torch.tensor([r[0] == int(label) for r, label in zip(read, labels, strict=True)])
    color_right = torch.tensor([r[1] == int(color) for r, color in zip(read, colors, strict=True)])
    return Captioned(images, captions, digit_right, share(digit_right), share(color_right))


def fused_speedup(model: Emu3, tokens: Tensor, weights: Tensor, *, pairs: int = 7) -> float:
    """Median ratio of reference to fused time of one training step, interleaved."""

    def seconds() -> float:
        elapsed = seconds_of(lambda: model.loss(tokens, weights).backward(), tokens.device)
        model.zero_grad(set_to_none=True)
        return elapsed

    ratios = []
    for _ in range(pairs + 1):
        fused = seconds()
        with emu3_kernels.use_backend("reference"):
            ratios.append(seconds() / fused)
    return median(ratios[1:])  # the first pair warms up


def share(right: Tensor) -> float:
    """The share of True, to four digits."""
    return round(right.double().mean().item(), 4)
