"""The miniature's instruction tuning: captions of composed images, then questions about them.

Both stages train from token stores as ``emu3 train understand1-mini`` and ``understand2-mini`` do;
the second once with all weights and once with LoRA adapters.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from emu3.config import load_recipe
from emu3.data.codes import Making, fingerprint
from emu3.data.compose import chat_document, parts_document
from emu3.data.store import Document, Provenance, write_shard
from emu3.data.stream import SourceSettings, StoreStream, StreamSettings
from emu3.demo import plots
from emu3.demo.composed import PLACES, Composed, Question, compose
from emu3.demo.config import DigitSettings
from emu3.demo.digits import load_split
from emu3.demo.files import descriptions
from emu3.demo.miniature import Clock
from emu3.generate import generate_text
from emu3.model import Emu3
from emu3.templates import Turn, chat_prompt
from emu3.text import ByteTokenizer
from emu3.train.pretrain_loop import pretrain
from emu3.train.store_recipe import StoreRecipe
from emu3.vision import VisionTokenizer
from emu3.weights import load_decoder, load_vision

IMAGES, ASKED = 6000, 150
"""Images to train on, and held-out ones that questions are asked about."""
LORA = "lora.rank=16", "lora.alpha=32", "optim.lr=4e-3", "train.steps=800"
_AT_ONCE = 64
_SIZE, _DRAWN = 48, 8
"""Side of a square of an image; images in ``questions.png``."""
_LONGEST_ANSWER = 10
_VALIDATION_TEXTS = 2
_TEXT_CONTEXT = 255
"""Positions that every miniature has."""


def run(
    start: Path,
    out: Path,
    progress: Clock,
    *,
    overrides: Sequence[str] = (),
    images: int = IMAGES,
    asked: int = ASKED,
) -> dict[str, float]:
    """Tune the miniature in ``start``, measure it, and draw ``questions.png`` into ``out``.

    Args:
        start: a folder that ``emu3 demo`` filled: its ``runs`` hold a vision tokenizer and a
            decoder.
        out: a new folder.
        progress: takes the seconds of each stage.
        overrides: ``key=value`` words for every stage.
        images: to train on.
        asked: held-out images that questions are asked about.

    Returns:
        Shares of right answers about held-out images, of all weights and of adapters, and the
        loss of held-out texts before, between and after both stages.
    """
    vision, decoder = (start / "runs" / n / f"{n}.safetensors" for n in ("vision", "decoder"))
    tokenizer = load_vision(vision)
    text = ByteTokenizer(load_decoder(decoder).settings.vocabulary)
    with progress.stage("compose_images"):
        write_stores(out / "stores", tokenizer, text, images)
    stage = partial(_train, out, progress)
    first = stage("understand1-mini", decoder, "understand1", overrides)
    full = stage("understand2-mini", first, "understand2", overrides)
    lora = stage("understand2-mini", first, "understand2-lora", [*LORA, *overrides])
    metrics = {}
    with progress.stage("measure_answers"):
        held_out = _composed(asked, validation=True)
        codes = _encoded(tokenizer, held_out)
        for prefix, weights in (("", full), ("lora_", lora)):
            found = measure_answers(load_decoder(weights), text, held_out, codes)
            metrics |= {f"{prefix}{name}": value for name, value in found.items()}
    with progress.stage("measure_texts"):
        texts = out / "stores" / "validation"
        for name, weights in (("before", decoder), ("between", first), ("after", full)):
            metrics[f"text_loss_{name}"] = text_loss(load_decoder(weights), texts)
    draw_questions(out / "questions.png", load_decoder(full), text, held_out, codes)
    return metrics


def write_stores(
    folder: Path, tokenizer: VisionTokenizer, text: ByteTokenizer, count: int = IMAGES
) -> None:
    """Write token stores of captions, of conversations and of texts, and one to validate texts.

    A caption names the squares in any order, and a conversation has from one to all questions:
    places are learned with the first, and where an answer ends with the second.

    Args:
        count: images, each with a caption and a conversation.
    """
    composed = _composed(count, validation=False)
    codes = _encoded(tokenizer, composed)
    random = torch.Generator().manual_seed(1)
    texts = [parts_document([words], text) for words in descriptions()]
    side = tokenizer.settings.image_size**2
    made = Provenance(
        source="digits",
        digest="0",
        vocabulary=text.vocabulary,
        text="bytes",
        vision=fingerprint(tokenizer),
        making=Making(min_pixels=side, max_pixels=3 * side),
    )
    stores: dict[str, Iterable[Document]] = {
        "captions": (
            parts_document([image.caption(_permuted(image.squares, random)), grid], text)
            for image, grid in zip(composed, codes, strict=True)
        ),
        "chats": (
            chat_document(_turns(image, grid, random), text)
            for image, grid in zip(composed, codes, strict=True)
        ),
        "texts": texts[:-_VALIDATION_TEXTS],
        "validation": texts[-_VALIDATION_TEXTS:],
    }
    for name, documents in stores.items():
        write_shard(folder / name / "digits", documents, made)


def measure_answers(
    model: Emu3, text: ByteTokenizer, composed: Sequence[Composed], codes: Sequence[Tensor]
) -> dict[str, float]:
    """Ask every question about every image; the share of right answers, also by kind."""
    right = defaultdict(list)
    for question, answer in _answered(model, text, composed, codes):
        right[question.kind].append(answer == question.answer)
    every = [one for kind in right.values() for one in kind]
    shares = {f"answer_{kind}_accuracy": sum(r) / len(r) for kind, r in right.items()}
    return {"answer_accuracy": sum(every) / len(every), **shares}


@torch.no_grad()
def text_loss(model: Emu3, folder: Path) -> float:
    """The loss of the texts in a store, in nats a token."""
    settings = StreamSettings(
        sources=(SourceSettings(store=folder),),
        context=_TEXT_CONTEXT,
        window=_VALIDATION_TEXTS,  # each of them once
        smallest_piece=64,
    )
    rows = StoreStream(settings, model.settings.vocabulary, 0).rows
    places = [(0, row) for row in range(len(rows.window(0).rows))]
    return float(model.loss(*rows[places]))


def draw_questions(
    path: Path,
    model: Emu3,
    text: ByteTokenizer,
    composed: Sequence[Composed],
    codes: Sequence[Tensor],
) -> None:
    """Draw some images and what is answered about them."""
    shown = composed[:_DRAWN]
    answered = _answered(model, text, shown, codes[:_DRAWN])
    lines = [
        [
            (f"{question.words} {answer}", answer == question.answer)
            for question, answer in islice(answered, len(of.questions()))
        ]
        for of in shown
    ]
    plots.draw_answers(path, [of.image for of in shown], lines)


def _train(
    out: Path, progress: Clock, recipe: str, start: Path, name: str, words: Sequence[str]
) -> Path:
    """Train a stage from the weights ``start``; return the file of the trained ones."""
    tables = load_recipe(recipe, (), StoreRecipe).data.sources
    sources = [
        f"{{store={json.dumps(str(out / 'stores' / source.store.name))}, weight={source.weight}}}"
        for source in tables
    ]
    given = [f"train.start={json.dumps(str(start))}", f"data.sources=[{', '.join(sources)}]"]
    with progress.stage(f"train_{name}"):
        return pretrain(load_recipe(recipe, [*given, *words], StoreRecipe), out / "runs" / name)


def _composed(count: int, *, validation: bool) -> list[Composed]:
    settings = DigitSettings()
    digits = load_split(settings.validation)[validation]
    generator = torch.Generator().manual_seed(int(validation))
    return compose(digits, settings, count, _SIZE, generator)


def _encoded(tokenizer: VisionTokenizer, composed: Sequence[Composed]) -> list[Tensor]:
    """Codes ``[h, w]`` of each image; images of one size are encoded together."""
    codes = [None] * len(composed)
    for height in PLACES:
        numbers = [n for n, of in enumerate(composed) if len(of.squares) == height]
        for at in range(0, len(numbers), _AT_ONCE):
            some = numbers[at : at + _AT_ONCE]
            grids = tokenizer.encode(torch.stack([composed[n].image for n in some]))
            for number, grid in zip(some, grids, strict=True):
                codes[number] = grid
    return codes


def _turns(image: Composed, codes: Tensor, random: torch.Generator) -> list[Turn]:
    """A conversation about an image: from one to all of its questions in any order."""
    questions = image.questions()
    count = int(torch.randint(len(questions), (), generator=random)) + 1
    asked = [questions[at] for at in _permuted(questions, random)[:count]]
    said = [[codes, asked[0].words], *([question.words] for question in asked[1:])]
    return [Turn(words, of.answer) for words, of in zip(said, asked, strict=True)]


def _permuted(things: Sequence, random: torch.Generator) -> list[int]:
    return torch.randperm(len(things), generator=random).tolist()


def _answered(
    model: Emu3, text: ByteTokenizer, composed: Sequence[Composed], codes: Sequence[Tensor]
) -> Iterator[tuple[Question, str]]:
    """Every question about every image, each in a conversation of its own, and its answer."""
    asked = [
        (grid, of) for image, grid in zip(composed, codes, strict=True) for of in image.questions()
    ]
    prompts = [chat_prompt([Turn([grid, of.words])], text) for grid, of in asked]
    for at in range(0, len(prompts), _AT_ONCE):
        answers = generate_text(model, text, prompts[at : at + _AT_ONCE], _LONGEST_ANSWER)
        for (_, question), answer in zip(asked[at : at + _AT_ONCE], answers, strict=True):
            yield question, answer.strip()
