"""``emu3 evaluate``: what is asked for, measured, and then written at once."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from emu3.data.store import Store
from emu3.files import replacing
from emu3.tools.evaluate.answers import Answered, answer_questions
from emu3.tools.evaluate.generation import Judged, judge_generation
from emu3.tools.evaluate.lines import PromptLine, QuestionLine, read_lines
from emu3.tools.evaluate.page import page_of
from emu3.tools.evaluate.perplexity import measure_perplexity
from emu3.tools.evaluate.reconstruction import HowSeen, Reconstructed, reconstruct_files
from emu3.tools.look import is_published
from emu3.tools.origin import Origin
from emu3.vision import VisionTokenizer
from emu3.voters import load_voter
from emu3.weights import Pretrained
from emu3.weights.clip import load_clip

JSON, PAGE = "evaluation.json", "evaluation.html"


@dataclass(frozen=True)
class Asked:
    """What is evaluated; a part whose inputs are None is left out."""

    images: Sequence[Path] = ()
    """Images, videos and folders of them, to reconstruct."""
    prompts: Path | None = None
    """JSON lines of prompts to generate from."""
    judges: Sequence[str] = ()
    """Names of voters for the generated images."""
    questions: Path | None = None
    """JSON lines of questions, answers and files."""
    store: Path | None = None
    """A token store, for perplexity."""
    origin: Origin = field(default_factory=Origin)
    """How to generate."""
    count: int = 1
    """Images of each prompt."""
    documents: int | None = None
    """Of the store; None reads all."""
    area: int | None = None
    """Pixels of an image that is reconstructed, about."""
    fps: Fraction | None = None
    """Frames a second that are taken of videos; None takes all."""
    lpips: Path | None = None
    """Weights of LPIPS."""
    clip: Path | None = None
    """Folder of CLIP, for the Fréchet distance of ``images`` and what is made."""
    max_tokens: int = 64
    """Of an answer."""
    batch: int = 8
    """Images or answers that are generated together."""


def check(asked: Asked) -> None:
    """Refuse what cannot be evaluated, before a model is read.

    Raises:
        ValueError: one line.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("evaluate: must run on one process")
    if not (asked.images or asked.prompts or asked.questions or asked.store):
        raise ValueError(
            "evaluate: --images, --prompts, --questions or --store must say what to evaluate"
        )
    if bool(asked.prompts) != bool(asked.judges):
        raise ValueError("evaluate: --prompts and --judge must come together")
    if asked.clip and not asked.images:
        raise ValueError("evaluate: --clip compares with --images, which must be given")


def evaluate(
    name: str, loaded: Pretrained | None, vision: VisionTokenizer, asked: Asked, out: Path
) -> dict:
    """Measure what ``asked`` names; write ``evaluation.json`` and ``evaluation.html`` to ``out``.

    Both files are written when all parts are done; an earlier evaluation stays until then.

    Args:
        name: of the model, for the page.
        loaded: None if ``asked`` has images to reconstruct alone.
        vision: the vision tokenizer.
        asked: what to evaluate.
        out: a folder.

    Returns:
        the contents of ``evaluation.json``.

    Raises:
        ValueError: one line, for inputs that are wrong.
    """
    check(asked)
    # All inputs are read before anything slow begins.
    prompts = read_lines(asked.prompts, PromptLine) if asked.prompts else []
    questions = read_lines(asked.questions, QuestionLine) if asked.questions else []
    store = Store(asked.store) if asked.store else None
    judges = {of: load_voter(of, str(vision.codebook.device)) for of in asked.judges}
    report: dict = {"model": name}
    reconstructed: Reconstructed | None = None
    judged: Judged | None = None
    answered: Answered | None = None
    if asked.images:
        how = _how_seen(asked, loaded, vision)
        reconstructed = reconstruct_files(asked.images, vision, how)
        report["reconstruction"] = reconstructed.report()
    if prompts:
        counts = {"count": asked.count, "batch": asked.batch}
        real = reconstructed and reconstructed.real
        judged = judge_generation(loaded, prompts, judges, asked.origin, **counts, real=real)
        report["generation"] = judged.report()
    if questions:
        how_many = {"max_tokens": asked.max_tokens, "fps": asked.fps, "batch": asked.batch}
        answered = answer_questions(loaded, questions, asked.questions.parent, **how_many)
        report["answers"] = answered.report()
    if store is not None:
        report["perplexity"] = measure_perplexity(loaded, store, asked.documents).report()
    folder = asked.questions.parent if asked.questions else None
    page = page_of(f"Evaluation of {name}", report, reconstructed, judged, answered, folder)
    write(out, report, page)
    return report


def _how_seen(asked: Asked, loaded: Pretrained | None, vision: VisionTokenizer) -> HowSeen:
    """A miniature takes squares of one size unless an area is asked for."""
    takes_squares = loaded is not None and not is_published(loaded) and asked.area is None
    side = vision.settings.image_size if takes_squares else None
    device = str(vision.codebook.device)
    clip = None if asked.clip is None else load_clip(asked.clip, device)
    return HowSeen(side, asked.area, asked.fps, asked.lpips, clip)


def write(out: Path, report: Mapping, page: str) -> None:
    """The page, and then the JSON file, each whole or not at all."""
    with replacing(out / PAGE) as draft:
        draft.write_text(page, "utf-8")
    with replacing(out / JSON) as draft:
        draft.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")
