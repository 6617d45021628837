"""How often a model answers a question about images or a video exactly right."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from emu3.generate import generate_text
from emu3.templates import Turn, chat_prompt
from emu3.tools.converse import answer_room
from emu3.tools.evaluate.lines import QuestionLine, batches, by_tag
from emu3.tools.look import look
from emu3.weights import Pretrained


@dataclass(frozen=True)
class Answered:
    """The answers of a model, one for each line."""

    lines: Sequence[QuestionLine]
    answers: Sequence[str]

    @property
    def right(self) -> list[bool]:
        """Whether each answer equals one that is right, as :func:`normalised`."""
        return [
            normalised(answer) in map(normalised, line.answers)
            for line, answer in zip(self.lines, self.answers, strict=True)
        ]

    def report(self) -> dict:
        right = self.right
        tags = by_tag([line.tag for line in self.lines], map(float, right))
        return {
            "accuracy": round(sum(right) / len(right), 6),
            "by_tag": {tag: round(value, 6) for tag, value in tags.items()},
            "questions": len(right),
        }


def normalised(answer: str) -> str:
    """An answer without what exact match ignores: case, whitespace and a full stop at the end."""
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()


def answer_questions(
    loaded: Pretrained,
    lines: Sequence[QuestionLine],
    folder: Path,
    *,
    max_tokens: int = 64,
    fps: Fraction | None = None,
    batch: int = 8,
) -> Answered:
    """Ask each question in a conversation of its own, greedily.

    Args:
        loaded: the model.
        lines: questions, with files below ``folder``, which the model sees before the question.
        folder: of relative paths.
        max_tokens: of an answer.
        fps: frames a second that are taken of a video; None takes all.
        batch: questions that are answered together.

    Raises:
        ValueError: one line, if a file cannot be read or a question is too long.
    """
    answers: list[str] = []
    for part in batches(lines, batch, "answers"):
        prompts = []
        for line in part:
            seen = [look(folder / path, loaded, fps=fps) for path in line.shown]
            prompts.append(chat_prompt([Turn([*seen, line.question])], loaded.text))
        most = min(max_tokens, answer_room(loaded, prompts, None))
        answers += generate_text(loaded.model, loaded.text, prompts, most)
    return Answered(lines, answers)
