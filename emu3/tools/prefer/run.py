"""The run of ``emu3 prefer`` on prompts: groups of them are sampled, voted on, and paired.

A group leaves a file of its samples, one of its votes and one of its pairs: a stopped run goes on
where it was, other voters or thresholds sample nothing again. Under torchrun each process takes its
share of the groups. ``P`` prompts of a group, ``K`` images of each, ``V`` voters.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath

import torch
from torch import Tensor

from emu3.data.codes import fingerprint
from emu3.data.media import write_image
from emu3.data.order import key_of
from emu3.data.pairs import Pairs, PairsHeader, Sampled, joined, load_pairs, save_pairs
from emu3.generate import Sampling, generate_images
from emu3.model import Emu3
from emu3.prompt import generation_prompt
from emu3.settings import Settings
from emu3.tools.bulk import Item, Outcome, Report, each
from emu3.tools.prefer.votes import HUMAN, Combine, HumanVotes, choose, combined
from emu3.train.reference import reference_of
from emu3.vision.images import to_levels
from emu3.voters import Voter
from emu3.weights import Pretrained, read_tensors, save_tensors
from emu3.weights.files import read_settings

PAIRS = "dpo.safetensors"
_GROUP = 16
"""Prompts of a group."""
_SAMPLES, _VOTES = "emu3_samples", "emu3_votes"


class _SamplesHeader(Settings):
    """What the samples of a group depend on."""

    decoder: str
    vision: str
    grid: tuple[int, int]
    sampled: Sampled
    prompts: tuple[str, ...]
    first: int
    """Number of the first prompt."""


class _VotesHeader(Settings):
    voters: tuple[str, ...]
    codes: int
    """A hash of what was voted on."""


@dataclass(frozen=True)
class Asked:
    """What is sampled, and how votes become pairs."""

    sampled: Sampled
    grid: tuple[int, int]
    combine: Combine = "mean"
    gap: float = 0.0
    """Pairs whose scores differ by no more are left out."""
    batch: int = 64
    """Images that are generated or decoded together."""
    images: bool = False
    """Write every sample as PNG too, for people to vote on."""


@dataclass(frozen=True)
class Made:
    """What came of a run."""

    outcome: Outcome
    prompts: int
    pairs: int


def prefer(
    prompts: Sequence[str],
    out: Path,
    loaded: Pretrained,
    voters: Mapping[str, Voter],
    asked: Asked,
    *,
    decoder: str,
    reference: Callable[[], Emu3] | None = None,
    human: HumanVotes | None = None,
) -> Made:
    """Sample images of prompts, let voters score them, and write ``out/dpo.safetensors``.

    The best and the worst image of a prompt become a pair. Image k of prompt i has the seed
    ``seed + i K + k``. Without voters and human votes, samples alone are made.

    Args:
        prompts: in their order.
        out: the folder to fill, or to go on in.
        loaded: samples, decodes and tokenizes.
        voters: by name.
        asked: how.
        decoder: fingerprint of the weights of ``loaded.model``.
        reference: gives the same model in float32, in eval mode; None takes ``loaded.model``.
        human: votes of people on samples that are there.

    Raises:
        ValueError: one line, if ``out`` was sampled otherwise, or has no pair in the end.
    """
    run = _Prefer(tuple(prompts), out, loaded, voters, asked, decoder, reference, human)
    firsts = range(0, len(prompts), _GROUP)
    items = [Item(out, PurePath(f"{first:05}")) for first in firsts]
    run.check_samples(items)
    outcome = each(items, lambda item: None, run.work, lambda item: False)
    votes = bool(voters) or human is not None
    if outcome.errors or not votes or int(os.environ.get("RANK", 0)):
        return Made(outcome, len(prompts), 0)
    return Made(outcome, len(prompts), run.merge(items))


@dataclass(frozen=True)
class _Prefer:
    prompts: tuple[str, ...]
    out: Path
    loaded: Pretrained
    voters: Mapping[str, Voter]
    asked: Asked
    decoder: str
    load_reference: Callable[[], Emu3] | None
    human: HumanVotes | None

    @cached_property
    def vision(self) -> str:
        return fingerprint(self.loaded.vision)

    @cached_property
    def reference(self) -> Emu3:
        return self.loaded.model if self.load_reference is None else self.load_reference()

    @property
    def header(self) -> PairsHeader:
        human = (HUMAN,) if self.human is not None else ()
        return PairsHeader(
            vocabulary=self.loaded.text.vocabulary,
            vision=self.vision,
            voters=(*self.voters, *human),
            sampled=self.asked.sampled,
            decoder=self.decoder,
        )

    def check_samples(self, items: Sequence[Item]) -> None:
        """Samples of other weights, prompts or settings would spoil the pairs."""
        for item in items:
            path = self._path("samples", item)
            if path.exists() and self._samples_header(item) != read_settings(
                path, _SAMPLES, _SamplesHeader
            ):
                raise ValueError(
                    f"prefer: {path} was sampled from other prompts, weights or settings: choose "
                    "another folder"
                )

    def work(self, item: Item, given: None, report: Report) -> None:
        codes = self._sampled(item, report)
        votes = self._voted(item, codes, report)
        if not votes.shape[2]:
            return
        pairs, path = self._paired(item, codes, votes), self._path("pairs", item)
        if pairs is None or self._is_made(path, pairs):
            return
        report("reference")
        found = reference_of(self.reference, pairs)
        save_pairs(path, replace(pairs, reference=found))

    def merge(self, items: Sequence[Item]) -> int:
        """Write the pairs of all groups to one file, and return how many there are."""
        parts = []
        for item in items:
            codes, votes = self._read(item)
            if self._paired(item, codes, votes) is not None:
                parts.append(load_pairs(self._path("pairs", item)))
        if not parts:
            raise ValueError(
                f"prefer: no two images of a prompt differ by more than the gap {self.asked.gap:g}"
            )
        save_pairs(self.out / PAIRS, joined(parts))
        return sum(map(len, parts))

    def _path(self, kind: str, item: Item) -> Path:
        return self.out / kind / f"{item.name}.safetensors"

    def _group(self, item: Item) -> tuple[int, tuple[str, ...]]:
        first = int(str(item.name))
        return first, self.prompts[first : first + _GROUP]

    def _samples_header(self, item: Item) -> _SamplesHeader:
        first, prompts = self._group(item)
        return _SamplesHeader(
            decoder=self.decoder,
            vision=self.vision,
            grid=self.asked.grid,
            sampled=self.asked.sampled,
            prompts=prompts,
            first=first,
        )

    def _sampled(self, item: Item, report: Report) -> Tensor:
        """The samples of a group, ``[P, K, h, w]`` int16, made if they are not there."""
        path = self._path("samples", item)
        if path.exists():
            return read_tensors(path)[0]["codes"]
        how, (first, prompts) = self.asked.sampled, self._group(item)
        sampling = Sampling(how.guidance, how.top_k, how.top_p, how.temperature, how.negative)
        captions = [prompt + how.positive for prompt in prompts for _ in range(how.samples)]
        begin = how.seed + first * how.samples
        seeds = [(begin + number) % 2**64 for number in range(len(captions))]
        drawn = []
        for at in range(0, len(captions), self.asked.batch):
            report(f"{at} of {len(captions)} images sampled")
            part = slice(at, at + self.asked.batch)
            given = self.loaded.model, self.loaded.text, captions[part], self.asked.grid
            with torch.inference_mode():
                drawn.append(generate_images(*given, sampling, seeds[part]).cpu().short())
        codes = torch.cat(drawn).unflatten(0, (len(prompts), how.samples))
        header = self._samples_header(item).model_dump_json()
        save_tensors(path, {"codes": codes}, {_SAMPLES: header})
        return codes

    def _voted(self, item: Item, codes: Tensor, report: Report) -> Tensor:
        """The votes on a group, ``[P, K, V]`` float32, cast if they are not there."""
        path, header = self._path("votes", item), self._votes_header(codes)
        has_images = not self.asked.images or all(p.exists() for p in self._pngs(item))
        if not (has_images and path.exists() and self._are_votes(path, header)):
            report("votes")
            tensors = {"votes": self._cast(item, codes)}
            save_tensors(path, tensors, {_VOTES: header.model_dump_json()})
        return self._with_human(item, read_tensors(path)[0]["votes"])

    def _votes_header(self, codes: Tensor) -> _VotesHeader:
        return _VotesHeader(voters=tuple(self.voters), codes=key_of(codes.numpy().tobytes()))

    def _are_votes(self, path: Path, header: _VotesHeader) -> bool:
        return read_settings(path, _VOTES, _VotesHeader) == header

    def _cast(self, item: Item, codes: Tensor) -> Tensor:
        _, prompts = self._group(item)
        said = [prompt for prompt in prompts for _ in range(codes.shape[1])]
        votes, pngs = [], iter(self._pngs(item))
        device = self.loaded.vision.codebook.device
        for at in range(0, len(said), self.asked.batch):
            part = slice(at, at + self.asked.batch)
            pixels = self.loaded.vision.decode(codes.flatten(0, 1)[part].long().to(device))
            if self.asked.images:
                for image, png in zip(to_levels(pixels), pngs, strict=False):
                    write_image(png, image.cpu())
            seen = (pixels.float().clamp(-1, 1) + 1) / 2
            scores = [voter(seen, said[part]).float().cpu() for voter in self.voters.values()]
            votes.append(torch.stack(scores, 1) if scores else torch.empty(len(seen), 0))
        return torch.cat(votes).unflatten(0, codes.shape[:2])

    def _pngs(self, item: Item) -> list[Path]:
        first, prompts = self._group(item)
        images = range(self.asked.sampled.samples)
        return [
            self.out / "images" / f"{first + number:05}-{k}.png"
            for number in range(len(prompts))
            for k in images
        ]

    def _with_human(self, item: Item, votes: Tensor) -> Tensor:
        if self.human is None:
            return votes
        first, prompts = self._group(item)
        rows = [
            [self.human.get((first + number, k), torch.nan) for k in range(votes.shape[1])]
            for number in range(len(prompts))
        ]
        return torch.cat((votes, torch.tensor(rows)[..., None]), 2)

    def _read(self, item: Item) -> tuple[Tensor, Tensor]:
        paths = [self._path(kind, item) for kind in ("samples", "votes")]
        for path in paths:
            if not path.exists():
                raise ValueError(f"prefer: no file {path}: a process failed, run it again")
        codes, votes = read_tensors(paths[0])[0]["codes"], read_tensors(paths[1])[0]["votes"]
        return codes, self._with_human(item, votes)

    def _paired(self, item: Item, codes: Tensor, votes: Tensor) -> Pairs | None:
        """The pairs of a group without the reference; None without a pair."""
        scores = combined(votes, self.asked.combine)
        kept, best, worst = choose(scores, self.asked.gap)
        if not len(kept):
            return None
        text, positive = self.loaded.text, self.asked.sampled.positive
        _, prompts = self._group(item)
        words = [prompts[number] for number in kept.tolist()]
        ids = [generation_prompt(word + positive, self.asked.grid, text) for word in words]
        both = torch.stack((best, worst), 1)
        return Pairs(
            self.header,
            words,
            [torch.tensor(one, dtype=torch.int32) for one in ids],
            codes[kept, best],
            codes[kept, worst],
            votes[kept[:, None], both],
            scores[kept[:, None], both],
        )

    def _is_made(self, path: Path, pairs: Pairs) -> bool:
        if not path.exists():
            return False
        found = load_pairs(path)
        names = "chosen", "rejected", "votes", "scores"
        same = all(torch.equal(getattr(found, n), getattr(pairs, n)) for n in names)
        return same and found.header == pairs.header
