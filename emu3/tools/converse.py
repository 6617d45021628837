"""A conversation about images and video with a model: ``emu3 chat``."""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from emu3.data.media import IMAGES, VIDEOS
from emu3.generate import Past, generate_text
from emu3.prompt import Clip
from emu3.templates import Turn, chat_prompt
from emu3.tools.look import look
from emu3.weights import Pretrained

MOST_TOKENS = 1024
"""Of an answer, if no other number is asked for and so many fit."""

# In quotes, with escaped spaces as terminals insert dropped files, or up to the next space.
_WORD = re.compile(r""""[^"]*"|'[^']*'|(?:\\.|\S)+""")
_AFTER_A_PATH = "?!.,;:)"


class Conversation:
    """Turns with a model, which sees all of them with every question; old ones are fed once.

    Args:
        loaded: the model.
        max_tokens: of an answer; None is ``MOST_TOKENS``, or what fits.
        fps: frames a second that are taken of a video; None takes all.
    """

    def __init__(
        self, loaded: Pretrained, max_tokens: int | None = None, fps: Fraction | None = None
    ) -> None:
        self.loaded, self.max_tokens, self.fps = loaded, max_tokens, fps
        self.turns: list[Turn] = []
        self.past = Past()
        self.shown: list[Tensor | Clip] = []
        """What the next question is about, beside earlier turns."""

    def show(self, paths: Sequence[Path]) -> None:
        """Add images and clips to the next question; none if one cannot be read."""
        self.shown += [look(path, self.loaded, fps=self.fps) for path in paths]

    def ask(self, words: str, on_text: Callable[[str], None]) -> None:
        """Answer ``words`` piece by piece; an answer that an exception stops counts as far as told.

        Args:
            words: the question, after what was shown.
            on_text: takes each piece, of whole characters, as soon as there is one.

        Raises:
            ValueError: nothing is said, or more than the model's context holds.
        """
        said, answer = [*self.shown, words], ""
        prompt = chat_prompt([*self.turns, Turn(said)], self.loaded.text)

        def tell(_: int, piece: str) -> None:
            nonlocal answer
            answer += piece
            on_text(piece)

        most = answer_room(self.loaded, [prompt], self.max_tokens)
        model, text = self.loaded.model, self.loaded.text
        try:
            generate_text(model, text, [prompt], most, on_text=tell, past=self.past)
        finally:
            if answer:
                self.turns.append(Turn(said, answer))
                self.shown = []

    def forget(self) -> None:
        """Begin anew."""
        self.turns, self.shown, self.past = [], [], Past()


def answer_room(
    loaded: Pretrained, prompts: Sequence[Sequence[int]], max_tokens: int | None
) -> int:
    """Tokens that an answer to any of the prompts may have."""
    room = loaded.model.settings.max_position_embeddings + 1 - max(map(len, prompts))
    return max_tokens or min(MOST_TOKENS, max(1, room))


def split(line: str) -> tuple[list[Path], str]:
    """The paths of images and videos in a line, and its other words."""
    paths: list[Path] = []

    def take(match: re.Match) -> str:
        path, after = path_of(match[0])
        if path is None:
            return match[0]
        paths.append(path)
        return after

    words = _WORD.sub(take, line)
    if not paths:
        return paths, line.strip()
    return paths, re.sub(r" +(?=[ ?!.,;:]|$)", "", words).strip()


def path_of(word: str) -> tuple[Path | None, str]:
    """The path of an image or a video that a word is, by its ending, and a sign that follows it."""
    bare = word[1:-1] if word[0] in "\"'" else re.sub(r"\\(.)", r"\1", word)
    name = bare.rstrip(_AFTER_A_PATH)
    path = Path(name)
    if path.suffix.lower() not in IMAGES | VIDEOS:
        return None, ""
    return path.expanduser(), bare[len(name) :]
