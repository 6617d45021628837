"""Generation: captions to images and clips, and prompts of any parts to text."""

from emu3.generate.batch import Batch, Generation, Sampling
from emu3.generate.past import Past
from emu3.generate.path import Forwards
from emu3.generate.text import generate_captions, generate_text
from emu3.generate.visual import generate_clips, generate_images
from emu3.generate.window import Window

__all__ = [
    "Batch",
    "Forwards",
    "Generation",
    "Past",
    "Sampling",
    "Window",
    "generate_captions",
    "generate_clips",
    "generate_images",
    "generate_text",
]
