"""The demo's judges as voters: is it the digit, is it the colour of the caption?

Name them to ``emu3 evaluate`` as ``emu3.demo.voters:digit`` and ``emu3.demo.voters:color``; their
means are accuracies. They are fitted on real scans and never on generated images.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from emu3.demo.config import DigitSettings
from emu3.demo.digits import load_split, read_caption
from emu3.demo.judge import DigitJudge, judge_color


def digit(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 where an image ``[B, 3, H, H]`` in [0, 1] shows the digit that its prompt names, else 0."""
    return _equal(_judge(images.shape[-1])(images.cpu() * 2 - 1), _wanted(prompts, 0))


def color(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 where an image ``[B, 3, H, H]`` in [0, 1] has the colour that its prompt names, else 0."""
    return _equal(judge_color(images.cpu() * 2 - 1), _wanted(prompts, 1))


def _equal(judged: Tensor, wanted: Tensor) -> Tensor:
    return (judged == wanted).float()


def _wanted(prompts: Sequence[str], part: int) -> Tensor:
    found = [read_caption(prompt)[part] for prompt in prompts]
    for prompt, one in zip(prompts, found, strict=True):
        if one is None:
            raise ValueError(
                f'voter: a prompt must read "a red seven" for the demo, got {prompt!r}'
            )
    return torch.tensor(found)


@cache
def _judge(size: int) -> DigitJudge:
    settings = DigitSettings()
    return DigitJudge(load_split(settings.validation)[0], settings, size)
