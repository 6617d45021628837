"""Preference pairs: a prompt, and of its images the chosen and the rejected one, as stored codes.

The codes are those that were sampled: images are never encoded again. One file holds pairs of one
grid. Beside the codes are the log-probabilities of the reference model, computed once, with the
fingerprint of its weights.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from emu3.config import Vocabulary
from emu3.prompt import frame_ids
from emu3.settings import Settings
from emu3.weights import read_tensors, save_tensors
from emu3.weights.files import opened, read_settings, shards_of

_KEY = "emu3_pairs"
_PIECE = 32 << 20
"""Bytes that are hashed at a time."""


class Sampled(Settings):
    """How the images of a file were sampled."""

    samples: PositiveInt
    """Images of a prompt."""
    seed: NonNegativeInt
    """Of the first image; it counts up."""
    guidance: float
    top_k: int | None
    top_p: float | None
    temperature: float
    positive: str = ""
    """Words after every prompt."""
    negative: str = ""


class PairsHeader(Settings):
    """Provenance of a file of pairs."""

    version: Literal[1] = 1
    vocabulary: Vocabulary
    """Of the ids of the prompts."""
    vision: str
    """Fingerprint of the vision tokenizer."""
    voters: tuple[str, ...]
    sampled: Sampled | None = None
    """None of images that were given."""
    decoder: str | None = None
    """Fingerprint of the reference model; None without reference log-probabilities."""


@dataclass(frozen=True)
class Pairs:
    """n pairs of one grid."""

    header: PairsHeader
    prompts: Sequence[str]
    ids: Sequence[Tensor]
    """int32 ``[t]`` each: from BOS to ``img_token``."""
    chosen: Tensor
    """int16 ``[n, h, w]``."""
    rejected: Tensor
    votes: Tensor
    """float32 ``[n, 2, voters]``, of the chosen and of the rejected image."""
    scores: Tensor
    """float32 ``[n, 2]``, what was compared."""
    reference: Tensor | None = None
    """float64 ``[n, 2]``, log-probabilities of the visual tokens under the reference, in nats."""

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def lengths(self) -> Tensor:
        """Tokens ``[n]`` of both documents of each pair together."""
        height, width = self.chosen.shape[1:]
        codes = height * (width + 1) + 3  # EOF, eoi, EOS
        return torch.tensor([2 * (len(ids) + codes) for ids in self.ids], dtype=torch.int64)

    def documents(self, number: int) -> tuple[list[int], list[int]]:
        """Return ``BOS prompt image EOS`` of the chosen and of the rejected image."""
        words = self.header.vocabulary
        opening = self.ids[number].tolist()
        both = self.chosen[number].long(), self.rejected[number].long()
        images = [frame_ids(codes[None], words) for codes in both]
        chosen, rejected = ([*opening, *image, words.eoi, words.eos] for image in images)
        return chosen, rejected


def joined(parts: Sequence[Pairs]) -> Pairs:
    """Return the pairs of files of one grid and header, with a reference, in their order."""
    names = "chosen", "rejected", "votes", "scores", "reference"
    return Pairs(
        parts[0].header,
        [prompt for part in parts for prompt in part.prompts],
        [ids for part in parts for ids in part.ids],
        *(torch.cat([getattr(part, name) for part in parts]) for name in names),
    )


def save_pairs(path: Path, pairs: Pairs) -> None:
    """Write a file of pairs, atomically."""
    words = [prompt.encode() for prompt in pairs.prompts]
    tensors = {
        "prompts": torch.tensor([*b"".join(words)], dtype=torch.uint8),
        "prompt_lengths": torch.tensor([len(word) for word in words], dtype=torch.int64),
        "ids": torch.cat([torch.empty(0, dtype=torch.int32), *pairs.ids]),
        "id_lengths": torch.tensor([len(ids) for ids in pairs.ids], dtype=torch.int64),
        "chosen": pairs.chosen.contiguous(),
        "rejected": pairs.rejected.contiguous(),
        "votes": pairs.votes.contiguous(),
        "scores": pairs.scores.contiguous(),
    }
    if pairs.reference is not None:
        tensors["reference"] = pairs.reference.contiguous()
    save_tensors(path, tensors, {_KEY: pairs.header.model_dump_json()})


def load_pairs(path: Path) -> Pairs:
    """Read a file of pairs.

    Raises:
        ValueError: one line, if the file is damaged or of another kind.
    """
    header, tensors = load_header(path), read_tensors(path)[0]
    _check(path, header, tensors)
    words = bytes(tensors["prompts"].numpy()).decode()
    encoded, ends = words.encode(), tensors["prompt_lengths"].cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return Pairs(
        header,
        [encoded[start:end].decode() for start, end in zip(starts, ends, strict=True)],
        tensors["ids"].split(tensors["id_lengths"].tolist()),
        *(tensors[name] for name in ("chosen", "rejected", "votes", "scores")),
        tensors.get("reference"),
    )


def load_header(path: Path) -> PairsHeader:
    """Read the header of a file of pairs; the pairs are not read."""
    header = read_settings(path, _KEY, PairsHeader)
    if header is None:
        raise ValueError(f"pairs: {path} is not a file of pairs")
    return header


def _check(path: Path, header: PairsHeader, tensors: dict[str, Tensor]) -> None:
    chosen = tensors.get("chosen")
    if chosen is None or chosen.ndim != 3 or not chosen.numel():
        raise ValueError(f"pairs: {path} must hold chosen [n, h, w], and at least one pair")
    count, shape = len(chosen), tuple(chosen.shape)
    expected = {
        "chosen": (torch.int16, shape),
        "rejected": (torch.int16, shape),
        "votes": (torch.float32, (count, 2, len(header.voters))),
        "scores": (torch.float32, (count, 2)),
        "prompt_lengths": (torch.int64, (count,)),
        "id_lengths": (torch.int64, (count,)),
    }
    if header.decoder is not None:
        expected["reference"] = torch.float64, (count, 2)
    for name, (dtype, wanted) in expected.items():
        found = tensors.get(name)
        if found is None or (found.dtype, tuple(found.shape)) != (dtype, wanted):
            got = "none" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise ValueError(f"pairs: {path}: {name} must be {dtype} {wanted}, got {got}")
    for name, lengths in (("prompts", "prompt_lengths"), ("ids", "id_lengths")):
        if name not in tensors or len(tensors[name]) != int(tensors[lengths].sum()):
            raise ValueError(f"pairs: {path} is damaged: {name} must have the sum of {lengths}")
    for name in ("chosen", "rejected"):
        low, high = (int(value) for value in tensors[name].aminmax())
        if low < 0 or high >= header.vocabulary.num_visual:
            raise ValueError(
                f"pairs: {path}: {name} must be codes below {header.vocabulary.num_visual}, got "
                f"{low} to {high}"
            )


def files_of_pairs(path: Path) -> list[Path]:
    """List the file itself, or the files ``dpo*.safetensors`` of a folder, one for each grid.

    Raises:
        ValueError: one line, if there is none.
    """
    found = sorted(path.glob("dpo*.safetensors")) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        what = "file dpo*.safetensors in" if path.is_dir() else "file"
        raise ValueError(f"pairs: no {what} {path}")
    return found


def weights_fingerprint(path: Path) -> str:
    """Return 16 hexadecimal digits of the names, dtypes and bytes of the weights in ``path``.

    Of a file or a folder of shards: how tensors are spread over files does not matter.
    """
    shards = {name: shard for shard in shards_of(path) for name in _names(shard)}
    digest = hashlib.sha256()
    for name in sorted(shards):
        with opened(shards[name]) as file:
            part = file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            digest.update(f"{name} {dtype} {shape}".encode())
            if not shape:
                digest.update(_bytes(file.get_tensor(name)))
                continue
            rows = max(1, _PIECE // max(1, 4 * torch.Size(shape[1:]).numel()))
            for start in range(0, shape[0], rows):
                digest.update(_bytes(part[start : start + rows]))
    return digest.hexdigest()[:16]


def _names(path: Path) -> list[str]:
    with opened(path) as file:
        return list(file.keys())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
