"""Checkpoints in and out, as safetensors; the only package that knows foreign key names."""

from emu3.weights.decoder import load_decoder, load_decoder_into, official_views, save_decoder
from emu3.weights.files import fill, read_tensors, save_tensors
from emu3.weights.folders import Layout, save
from emu3.weights.load import Pretrained, load
from emu3.weights.quantized import Weights, quantize
from emu3.weights.vision import load_vision, save_vision

__all__ = [
    "Layout",
    "Pretrained",
    "Weights",
    "fill",
    "load",
    "load_decoder",
    "load_decoder_into",
    "load_vision",
    "official_views",
    "quantize",
    "read_tensors",
    "save",
    "save_decoder",
    "save_tensors",
    "save_vision",
]
