"""Voters: what scores images, for curation, selection, preferences and evaluation alike.

Weights are read from local files: nothing is downloaded and no pickle is run.
"""

import importlib
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.weights.files import read_tensors

_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
_LUMA = (0.299, 0.587, 0.114)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_AESTHETIC = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
"""The linear layers of LAION's predictor; dropout lies between them, and no activation."""


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
    prompt by CLIP, ``hpsv2:FOLDER`` the same by HPSv2. ``module:function`` is one's own.

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


class _Clip:
    """CLIP of a folder in the format of transformers, and its preprocessing."""

    def __init__(self, folder: Path, device: str) -> None:
        # Imported here: only voters with weights need it.
        from transformers import AutoTokenizer, CLIPModel

        for name in ("config.json", "model.safetensors"):
            _present(folder / name)
        self.folder, self.device = folder, device
        self.model = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        self.model.eval().to(device)
        self._load_tokenizer = lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._tokenizer: Any = None

    def images(self, images: Tensor) -> Tensor:
        """Normalised embeddings ``[B, D]``: the short edge resized, the centre cropped."""
        side = self.model.config.vision_config.image_size
        height, width = images.shape[2:]
        scale = side / min(height, width)
        size = [max(side, int(edge * scale)) for edge in (height, width)]
        resized = F.interpolate(images.to(self.device), size, mode="bicubic", antialias=True)
        top, left = ((edge - side) // 2 for edge in size)
        cropped = resized[..., top : top + side, left : left + side].clamp(0, 1)
        mean, std = (cropped.new_tensor(of).view(3, 1, 1) for of in (_CLIP_MEAN, _CLIP_STD))
        seen = self.model.vision_model(pixel_values=(cropped - mean) / std).pooler_output
        return F.normalize(self.model.visual_projection(seen), dim=1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Normalised embeddings ``[B, D]``; a long prompt is truncated."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        length = self.model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        read = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(read), dim=1)


def _clip(folder: str, device: str) -> Voter:
    _present(Path(folder) / "tokenizer_config.json")
    clip = _Clip(Path(folder), device)
    return lambda images, prompts: (clip.images(images) * clip.texts(prompts)).sum(1)


def _aesthetic(folder: str, device: str) -> Voter:
    head = _head(Path(folder))
    weight, bias = fold(_read_state(head))
    clip = _Clip(Path(folder), device)
    width = clip.model.config.projection_dim
    if weight.shape != (width,):
        raise ValueError(
            f"voter aesthetic: {head} must take embeddings of {width}, got {len(weight)}"
        )
    weight, bias = weight.to(device), bias.to(device)
    return lambda images, prompts: clip.images(images) @ weight + bias


def fold(layers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Fold linear layers without activations into one: ``score = x @ weight + bias``.

    Args:
        layers: weights and biases of LAION's aesthetic predictor, by its names.

    Returns:
        ``[D]`` and ``[]``, float32, computed in float64.
    """
    names = [f"{layer}.{part}" for layer in _AESTHETIC for part in ("weight", "bias")]
    missing = [name for name in names if name not in layers]
    if missing:
        raise ValueError(f"voter aesthetic: the head lacks {', '.join(missing)}")
    weight = torch.eye(layers[names[0]].shape[1], dtype=torch.float64)
    bias = torch.zeros(len(weight), dtype=torch.float64)
    for layer in _AESTHETIC:
        matrix = layers[f"{layer}.weight"].double()
        weight, bias = matrix @ weight, matrix @ bias + layers[f"{layer}.bias"].double()
    return weight[0].float(), bias[0].float()


def _head(folder: Path) -> Path:
    """The one file beside CLIP's ``model.safetensors`` that holds the predictor's layers."""
    files = sorted({*folder.glob("*.safetensors"), *folder.glob("*.pt"), *folder.glob("*.pth")})
    heads = [path for path in files if path.stem not in ("model", "pytorch_model")]
    if len(heads) != 1:
        raise FileNotFoundError(
            f"voter aesthetic: {folder} must hold one .safetensors, .pt or .pth of the head "
            f"beside model.safetensors, got {', '.join(path.name for path in heads) or 'none'}"
        )
    return heads[0]


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"voter: {path} must be a state dict of tensors; a pickled model is not loaded"
        ) from None
    return state.get("state_dict", state)


def _present(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"voter: no file {path}")


def _known() -> str:
    return ", ".join([f"damage:{name}" for name in _DAMAGE] + [f"{k}:FOLDER" for k in _FILES])


_FILES: dict[str, Callable[[str, str], Voter]] = {
    "aesthetic": _aesthetic,
    "clip": _clip,
    "hpsv2": _clip,
}
_KINDS = {"damage": _damage, **_FILES}
