"""The trained miniature, and a clock of the demo's stages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from emu3.demo.config import DigitRecipe
from emu3.demo.digits import Digits
from emu3.model import Emu3
from emu3.text import ByteTokenizer
from emu3.vision import VisionTokenizer


@dataclass(frozen=True)
class Miniature:
    """The two trained models, the training digits and the validation digits."""

    recipe: DigitRecipe
    model: Emu3
    tokenizer: VisionTokenizer
    text: ByteTokenizer
    train_set: Digits
    validation_set: Digits


class Clock:
    """Wall seconds of each stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)
