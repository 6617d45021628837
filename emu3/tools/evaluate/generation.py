"""How judges score the images that a model generates from prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from emu3.generate import Sampling, generate_images
from emu3.tools.draw import plan
from emu3.tools.evaluate.frechet import Moments, frechet_distance
from emu3.tools.evaluate.lines import PromptLine, batches, by_tag
from emu3.tools.origin import Origin
from emu3.vision.images import to_levels
from emu3.voters import Voter
from emu3.weights import Pretrained

_SHOWN = 24
"""Images on the page, evenly spread over the prompts."""


@dataclass(frozen=True)
class Judged:
    """Images of prompts, and their scores by each judge."""

    lines: Sequence[PromptLine]
    """One for each image."""
    shown: Mapping[int, Tensor]
    """``[3, H, W]`` uint8 of a few images, by their number."""
    scores: Mapping[str, Tensor]
    """``[B]`` of each judge."""
    chosen: Mapping[str, Tensor]
    """``[B]`` of each judge: 1 where the image's own prompt scores highest, 0 where another
    does, NaN where the line has no other or the judge scores all alike."""
    distance: float | None = None
    """Fréchet distance to real images, if there are some."""

    def report(self) -> dict:
        tags = [line.tag for line in self.lines]
        judges = {}
        for name, scores in self.scores.items():
            judges[name] = {
                "mean": round(scores.double().mean().item(), 6),
                "by_tag": _rounded(by_tag(tags, scores.tolist())),
            }
            chosen = self.chosen[name]
            compared = ~chosen.isnan()
            if compared.any():
                values = chosen[compared].tolist()
                among = [tag for tag, is_in in zip(tags, compared.tolist(), strict=True) if is_in]
                judges[name]["choice_accuracy"] = round(fmean(values), 6)
                judges[name]["choice_accuracy_by_tag"] = _rounded(by_tag(among, values))
        distance = {} if self.distance is None else {"frechet_clip": self.distance}
        return {"images": len(self.lines), **distance, "judges": judges}


def _rounded(means: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in means.items()}


def judge_generation(
    loaded: Pretrained,
    lines: Sequence[PromptLine],
    judges: Mapping[str, Voter],
    asked: Origin,
    *,
    count: int = 1,
    batch: int = 8,
    real: Moments | None = None,
) -> Judged:
    """Generate ``count`` images of each prompt and score them.

    Args:
        loaded: the model.
        lines: the prompts.
        judges: by name; a judge that answers 0 or 1 gives an accuracy.
        asked: how to generate; the seed counts up from its own.
        count: images of each prompt.
        batch: images that are generated together.
        real: of real images, which the generated ones are compared with.
    """
    made = plan(asked, loaded).origin
    how = Sampling(made.guidance, made.top_k, made.top_p, made.temperature, made.negative)
    repeated = [line for line in lines for _ in range(count)]
    others = _choices(lines)
    wanted = {at * len(repeated) // _SHOWN for at in range(_SHOWN)}
    shown: dict[int, Tensor] = {}
    scores: dict[str, list[Tensor]] = {name: [] for name in judges}
    chosen: dict[str, list[float]] = {name: [] for name in judges}
    moments = None if real is None else Moments(real.clip)
    for numbers in batches(range(len(repeated)), batch, "images"):
        part = [repeated[number] for number in numbers]
        captions = [line.prompt + made.positive for line in part]
        seeds = [asked.seed + number for number in numbers]
        codes = generate_images(loaded.model, loaded.text, captions, made.grid, how, seeds)
        images = to_levels(loaded.vision.decode(codes))
        shown.update((n, images[i].cpu()) for i, n in enumerate(numbers) if n in wanted)
        if moments is not None:
            moments.add(images)
        for name, judge in judges.items():
            mine = judge(images.float() / 255, [line.prompt for line in part])
            scores[name].append(mine)
            chosen[name] += [
                _is_highest(judge, image, float(score), others[line.prompt])
                for image, score, line in zip(images, mine, part, strict=True)
            ]
    return Judged(
        repeated,
        shown,
        {name: torch.cat(of) for name, of in scores.items()},
        {name: torch.tensor(of) for name, of in chosen.items()},
        _distance(real, moments),
    )


def _distance(real: Moments | None, made: Moments | None) -> float | None:
    if real is None or made is None or min(real.count, made.count) < 2:
        return None
    return frechet_distance(real, made)


def _choices(lines: Sequence[PromptLine]) -> dict[str, list[str]]:
    """The prompts that each is compared with."""
    groups: dict[str, set[str]] = {}
    for line in lines:
        if line.include:
            groups.setdefault(line.tag, set()).add(line.prompt)
    return {
        line.prompt: sorted(
            {*line.choices, *(groups[line.tag] if line.include else ())} - {line.prompt}
        )
        for line in lines
    }


def _is_highest(judge: Voter, image: Tensor, score: float, others: Sequence[str]) -> float:
    """NaN if there is no other prompt, or the judge does not tell them apart."""
    if not others:
        return float("nan")
    images = (image.float() / 255).expand(len(others), -1, -1, -1)
    of_others = judge(images, others)
    return float("nan") if of_others.eq(score).all() else float(score > of_others.max().item())
