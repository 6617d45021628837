"""CLIP from local files: transformers' folders, and open_clip's weights of HPSv2.

Nothing is downloaded and no pickle is run.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.weights.files import read_tensors

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_AESTHETIC = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
"""The linear layers of LAION's predictor; dropout lies between them, and no activation."""
_VIT_H = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}
"""open_clip's ViT-H-14, the model of HPSv2."""
_OPEN_CLIP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


class Clip:
    """CLIP and its preprocessing.

    Args:
        model: of transformers, ``CLIPModel``.
        folder: of the tokenizer.
        pad: whether an image is padded to a square, and not cropped to one.
    """

    def __init__(self, model: Any, folder: Path, device: str, *, pad: bool = False) -> None:
        self.model = model.float().eval().requires_grad_(False).to(device)
        self.device, self.pad, self._folder = device, pad, folder
        self._tokenizer: Any = None

    @property
    def width(self) -> int:
        """Of an embedding."""
        return self.model.config.projection_dim

    def images(self, images: Tensor) -> Tensor:
        """Normalised embeddings ``[B, D]`` of ``[B, 3, H, W]`` in [0, 1]."""
        pixels = self.pixels(images.to(self.device))
        seen = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(seen), dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Normalised embeddings ``[B, D]``; a long text is truncated."""
        if self._tokenizer is None:
            # Imported here, as below: transformers is slow to import.
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        length = self.model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        read = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(read), dim=1)

    def pixels(self, images: Tensor) -> Tensor:
        """Resize (bicubic) and normalise: the centre of an image, or all of it padded in black."""
        side = self.model.config.vision_config.image_size
        height, width = images.shape[2:]
        if self.pad:
            size = [max(1, round(edge * side / max(height, width))) for edge in (height, width)]
        else:
            size = [max(side, int(edge * side / min(height, width))) for edge in (height, width)]
        x = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        spare = [side - edge for edge in size]  # negative where the centre is taken
        top, left = (edge // 2 if self.pad else -(-edge // 2) for edge in spare)
        x = F.pad(x, (left, spare[1] - left, top, spare[0] - top))
        mean, std = (x.new_tensor(of).view(3, 1, 1) for of in (_MEAN, _STD))
        return (x - mean) / std


def load_clip(folder: Path, device: str) -> Clip:
    """CLIP from a folder of transformers.

    Raises:
        OSError: one line, if a file is missing.
    """
    for name in ("config.json", "model.safetensors"):
        present(folder / name)
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return Clip(model, folder, device)


def load_hpsv2(folder: Path, device: str) -> Clip:
    """HPSv2: open_clip's ``HPS_v2*.pt`` beside CLIP's tokenizer, or a folder of transformers.

    Raises:
        OSError: one line, if a file is missing.
        ValueError: one line, if the weights are not those of the model.
    """
    files = sorted(folder.glob("HPS_v2*.pt"))
    if not files:
        clip = load_clip(folder, device)
        clip.pad = True
        return clip
    from transformers import CLIPConfig, CLIPModel

    state = read_state(files[-1])
    config = folder / "config.json"
    settings = CLIPConfig.from_pretrained(config) if config.is_file() else CLIPConfig(**_VIT_H)
    with torch.device("meta"):
        model = CLIPModel(settings)
    converted = from_open_clip(state)
    wrong = {
        name
        for name, value in model.state_dict().items()
        if name not in converted or converted[name].shape != value.shape
    }
    if wrong:
        raise ValueError(
            f"voter: {files[-1]} must have the weights of CLIP, but {min(wrong)} is missing or "
            f"has another shape, and so have {len(wrong) - 1} others"
        )
    model = CLIPModel(settings)
    model.load_state_dict({name: converted[name].float() for name in model.state_dict()})
    return Clip(model, folder, device, pad=True)


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a CLIP of open_clip under the names of transformers."""
    found = {}
    for name, value in state.items():
        if name in ("visual.proj", "text_projection"):
            kind = "visual" if name == "visual.proj" else "text"
            found[f"{kind}_projection.weight"] = value.T.contiguous()
            continue
        prefix = next((of for of in _OPEN_CLIP if name == of or name.startswith(f"{of}.")), None)
        if prefix is None:
            continue
        rest = name[len(prefix) :]
        if ".attn.in_proj_" not in rest:
            for ours, theirs in _IN_BLOCK.items():
                rest = rest.replace(f".{ours}.", f".{theirs}.")
            found[_OPEN_CLIP[prefix] + rest] = value
            continue
        block, part = rest.split(".attn.in_proj_")
        for head, third in zip("qkv", value.chunk(3), strict=True):
            found[f"{_OPEN_CLIP[prefix]}{block}.self_attn.{head}_proj.{part}"] = third.contiguous()
    return found


def read_aesthetic(folder: Path) -> tuple[Tensor, Tensor]:
    """LAION's predictor in ``folder``, beside CLIP's ``model.safetensors``: weight and bias.

    Raises:
        OSError: one line, if there is none or more than one.
        ValueError: one line, if it is another model.
    """
    files = sorted({*folder.glob("*.safetensors"), *folder.glob("*.pt"), *folder.glob("*.pth")})
    heads = [path for path in files if path.stem not in ("model", "pytorch_model")]
    if len(heads) != 1:
        raise FileNotFoundError(
            f"voter: {folder} must hold one .safetensors, .pt or .pth of the aesthetic predictor "
            f"beside model.safetensors, got {', '.join(path.name for path in heads) or 'none'}"
        )
    return fold(read_state(heads[0]), str(heads[0]))


def fold(layers: Mapping[str, Tensor], source: str = "the predictor") -> tuple[Tensor, Tensor]:
    """Fold linear layers without activations into one: ``score = x @ weight + bias``.

    Args:
        layers: weights and biases of LAION's aesthetic predictor, by its names.
        source: of the layers, for errors.

    Returns:
        ``[D]`` and ``[]``, float32, computed in float64.
    """
    names = [f"{layer}.{part}" for layer in _AESTHETIC for part in ("weight", "bias")]
    if missing := [name for name in names if name not in layers]:
        raise ValueError(f"voter: {source} lacks {', '.join(missing)}")
    weight, bias = None, None
    for layer in _AESTHETIC:
        matrix, offset = (layers[f"{layer}.{part}"].double() for part in ("weight", "bias"))
        weight = matrix if weight is None else matrix @ weight
        bias = offset if bias is None else matrix @ bias + offset
    return weight[0].float(), bias[0].float()


def read_state(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file or of a PyTorch file without code.

    Raises:
        ValueError: one line, if it is a pickled model.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise ValueError(
            f"voter: {path} must be a state dict of tensors; a pickled model is not loaded"
        ) from None
    return state.get("state_dict", state)


def present(path: Path) -> None:
    """Refuse a file that is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"voter: no file {path}")
