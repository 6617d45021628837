"""An untrained model of images and clips on disk, as small as one can be."""

from pathlib import Path

import torch

from emu3.model import Emu3
from emu3.vision import VisionTokenizer
from emu3.weights import save_decoder, save_vision
from tests.model.tiny import TINY, TINY_VISION


def tiny_files(folder: Path, **changes) -> list[str]:
    """Options that name it; its images have 4 by 4 codes, its clips 4 frames a frame of codes."""
    torch.manual_seed(0)
    settings = TINY.model_copy(update={"max_position_embeddings": 512, **changes})
    model = Emu3(settings)
    with torch.no_grad():
        model.head.weight[settings.vocabulary.eos] = 0  # others are likelier: no answer ends early
    save_decoder(folder / "decoder.safetensors", model)
    shape = {"image_size": 8, "temporal_factor": 4}
    save_vision(folder / "v.safetensors", VisionTokenizer(TINY_VISION.model_copy(update=shape)))
    return ["--model", f"{folder}/decoder.safetensors", "--vision", f"{folder}/v.safetensors"]
