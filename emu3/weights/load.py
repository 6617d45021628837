"""Everything of a model from one folder: decoder, vision tokenizer and text tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import torch

from emu3.config import EMU3_VOCABULARY
from emu3.model import Emu3
from emu3.text import ByteTokenizer, QwenTokenizer, TextTokenizer
from emu3.vision import VisionTokenizer
from emu3.weights.adapter import read_adapter
from emu3.weights.decoder import load_decoder
from emu3.weights.files import Headers, read_headers
from emu3.weights.hub import VISION_FOLDER
from emu3.weights.quantized import Weights
from emu3.weights.vision import holds_vision, load_vision

_VISION_FILE = "vision.safetensors"


@dataclass(frozen=True)
class Pretrained:
    """What generation and understanding need, all on one device, in eval mode."""

    model: Emu3
    vision: VisionTokenizer
    text: TextTokenizer


def load(
    path: Path | str,
    *,
    vision: Path | str | None = None,
    text: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
    base: Path | str | None = None,
) -> Pretrained:
    """Load a published folder, official or Hugging Face's, or a decoder that was trained here.

    Args:
        path: a folder with ``config.json`` and safetensors, or a file of ``emu3 train``; or the
            folder of a LoRA adapter of PEFT, which is merged into its base.
        vision: folder or file of the vision tokenizer; None takes the one in ``path``, or the
            folder ``Emu3-VisionTokenizer`` in it or beside it, or ``vision.safetensors`` beside it.
        text: file or folder of Qwen's merges; None looks in ``path``, and then in the package
            ``dashscope``. A decoder of bytes needs none.
        device: of decoder and vision tokenizer.
        dtype: of the decoder; None keeps that of the files. The vision tokenizer keeps its own,
            float32 in the published files, so that codes stay what they are.
        weights: ``"int8"``, ``"int4"`` or ``"fp8"``: quantizes the decoder's linear layers, each as
            soon as it is read, as :func:`quantize` does. Such a model can only generate.
        base: of an adapter; None takes the folder that its ``adapter_config.json`` names.

    Raises:
        ValueError: one line that names what is missing, unexpected or of another shape.
    """
    path = Path(path)
    adapter = read_adapter(path)
    if adapter is not None:
        path = adapter.base_of(base)
    elif base is not None:
        raise ValueError(f"load: base is of an adapter, but {path} has no adapter_config.json")
    how = {"device": device, "dtype": dtype, "weights": weights, "adapter": adapter}
    headers = read_headers(path)
    model = load_decoder(headers, **how)
    tokenizer = load_vision(_vision_of(headers) if vision is None else vision, device=device)
    num_codes, vocabulary = tokenizer.settings.num_codes, model.settings.vocabulary
    if num_codes != vocabulary.num_visual:
        raise ValueError(
            f"load: the vision tokenizer must have {vocabulary.num_visual} codes as the "
            f"vocabulary of {path}, got {num_codes}"
        )
    if vocabulary != EMU3_VOCABULARY:
        return Pretrained(model, tokenizer, ByteTokenizer(vocabulary))
    merges = path if text is None and path.is_dir() and QwenTokenizer.is_in(path) else text
    return Pretrained(model, tokenizer, QwenTokenizer(None if merges is None else Path(merges)))


def _vision_of(headers: Headers) -> Path | Headers:
    if holds_vision(headers.tensors):
        return headers
    path = headers.path
    places = (path, path.parent)
    for place in (*(folder / VISION_FOLDER for folder in places), path.parent / _VISION_FILE):
        if place.exists():
            return place
    raise ValueError(
        f"load: {path} must hold a vision tokenizer, or {VISION_FOLDER} lie in it or beside it: "
        "name its folder"
    )
