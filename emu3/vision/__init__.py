"""Emu3's vision tokenizer: images and video to codes and back."""

from emu3.vision.images import postprocess, preprocess, smart_resize
from emu3.vision.quantizer import Quantizer
from emu3.vision.streaming import decode_pieces, decode_stream, encode_pieces, encode_stream
from emu3.vision.tiling import decode_tiled, encode_tiled
from emu3.vision.tokenizer import VisionTokenizer

__all__ = [
    "Quantizer",
    "VisionTokenizer",
    "decode_pieces",
    "decode_stream",
    "decode_tiled",
    "encode_pieces",
    "encode_stream",
    "encode_tiled",
    "postprocess",
    "preprocess",
    "smart_resize",
]
