"""Voters: what scores images, for curation, selection, preferences and evaluation alike.

Weights are read from local files: nothing is downloaded and no pickle is run.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.weights.clip import Clip, load_clip, load_hpsv2, present, read_aesthetic

_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
_LUMA = (0.299, 0.587, 0.114)


class Voter(Protocol):
    """Any function ``score(images, prompts) -> scores``; higher is better."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1], float32.
            prompts: ``B`` captions; a voter may ignore them.

        Returns:
            ``[B]`` float32 on the CPU.
        """
        ...


def load_voter(name: str, device: str = "cpu") -> Voter:
    """Load the voter of this name; its scores are checked at each call.

    ``damage:sharpness`` and ``damage:colourfulness`` measure damage, not beauty, and take no file.
    ``aesthetic:FOLDER`` is LAION's predictor (1 to 10), ``clip:FOLDER`` the cosine of image and
    prompt by CLIP, of the centre of an image; ``hpsv2:FOLDER`` the same by HPSv2, of all of it. The
    folder is one of transformers, with a tokenizer; LAION's predictor lies beside
    ``model.safetensors``, which ``HPS_v2.1_compressed.pt`` may replace. ``module:function`` is
    one's own.

    Raises:
        ValueError: one line, if there is no such voter.
        OSError: one line, if its file is missing.
    """
    kind, separator, where = name.partition(":")
    if not separator or not kind or not where:
        raise ValueError(f"voter: a name must be KIND:WHAT, got {name!r}; known: {_known()}")
    load = _KINDS.get(kind)
    return _Checked(name, _own(kind, where) if load is None else load(where, device))


class _Checked:
    """A voter whose input and output are checked."""

    def __init__(self, name: str, score: Voter) -> None:
        self.name = name
        self._score = score

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(
                f"voter {self.name}: images must be [B, 3, H, W] with B prompts, got "
                f"{tuple(images.shape)} and {len(prompts)}"
            )
        scores = torch.as_tensor(self._score(images.float(), list(prompts))).float().cpu()
        if scores.shape != (len(images),) or not scores.isfinite().all():
            raise ValueError(
                f"voter {self.name}: scores must be {len(images)} finite numbers, got "
                f"{tuple(scores.shape)} with {int((~scores.isfinite()).sum())} that are not finite"
            )
        return scores.clone()


def sharpness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Variance of the Laplacian of the luma in 0..255: low if blurred, very high if noisy."""
    luma = torch.einsum("bchw,c->bhw", images * 255, images.new_tensor(_LUMA))[:, None]
    edges = F.conv2d(F.pad(luma, (1, 1, 1, 1), "replicate"), images.new_tensor([[_LAPLACIAN]]))
    return edges.flatten(1).var(1, correction=0)


def colourfulness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Hasler and Süsstrunk's measure in 0..255: 0 of a grey image, above 80 of a vivid one."""
    red, green, blue = (images * 255).flatten(2).unbind(1)
    opponents = torch.stack((red - green, (red + green) / 2 - blue), 1)
    spread = opponents.var(2, correction=0).sum(1).sqrt()
    return spread + 0.3 * opponents.mean(2).square().sum(1).sqrt()


_DAMAGE = {"sharpness": sharpness, "colourfulness": colourfulness}


def _damage(measure: str, device: str) -> Voter:
    if measure not in _DAMAGE:
        raise ValueError(f"voter damage:{measure}: no such measure; known: {', '.join(_DAMAGE)}")
    return _DAMAGE[measure]


def _own(module: str, function: str) -> Voter:
    try:
        score = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"voter {module}:{function}: {error}; known: {_known()}, or module:function"
        ) from None
    if not callable(score):
        raise ValueError(f"voter {module}:{function}: must be a function, got {type(score)}")
    return score


def _clip(folder: str, device: str) -> Voter:
    present(Path(folder) / "tokenizer_config.json")
    return _cosine(load_clip(Path(folder), device))


def _hpsv2(folder: str, device: str) -> Voter:
    present(Path(folder) / "tokenizer_config.json")
    return _cosine(load_hpsv2(Path(folder), device))


def _cosine(clip: Clip) -> Voter:
    return lambda images, prompts: (clip.images(images) * clip.texts(prompts)).sum(1)


def _aesthetic(folder: str, device: str) -> Voter:
    weight, bias = (of.to(device) for of in read_aesthetic(Path(folder)))
    clip = load_clip(Path(folder), device)
    if weight.shape != (clip.width,):
        raise ValueError(
            f"voter aesthetic:{folder}: the predictor must take embeddings of {clip.width}, got "
            f"{len(weight)}"
        )
    return lambda images, prompts: clip.images(images) @ weight + bias


def _known() -> str:
    return ", ".join([f"damage:{name}" for name in _DAMAGE] + [f"{k}:FOLDER" for k in _FILES])


_FILES: dict[str, Callable[[str, str], Voter]] = {
    "aesthetic": _aesthetic,
    "clip": _clip,
    "hpsv2": _hpsv2,
}
_KINDS = {"damage": _damage, **_FILES}
