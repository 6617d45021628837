"""The miniature's quality fine-tuning: images of its own, of which it learns the better half.

A voter selects them, and judges that never voted measure what is generated before and after. The
same training on all images is measured beside it: what it lacks, the selection brought.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from emu3.config import load_recipe
from emu3.data.codes import Making, fingerprint
from emu3.data.store import Document, Kind, Provenance, Store, write_shard
from emu3.demo import plots
from emu3.demo.config import DigitSettings
from emu3.demo.digits import load_split
from emu3.demo.judge import DigitJudge
from emu3.demo.measure import Generated, every_caption, measure_generation
from emu3.demo.miniature import Clock
from emu3.demo.voters import digit, likeness
from emu3.generate import Sampling, generate_images
from emu3.model import Emu3
from emu3.prompt import generation_document
from emu3.text import ByteTokenizer
from emu3.tools.score import score_store
from emu3.train.pretrain_loop import pretrain
from emu3.train.store_recipe import StoreRecipe
from emu3.vision import VisionTokenizer
from emu3.weights import load_decoder, load_vision

PLAIN = Sampling(guidance=1.0, top_k=None)
"""From the model's own distribution: guidance would hide its mistakes."""
_RECIPE = "quality-mini"
_SEED = 1 << 20
"""Of the first sample; seeds below are those of what is measured."""
_AT_ONCE = 320
_ROWS = {"before": "before", "unselected": "all images", "after": "better half"}
"""Of the plot."""


def run(
    start: Path,
    out: Path,
    progress: Clock,
    *,
    overrides: Sequence[str] = (),
    samples: int = 15,
    rounds: int = 6,
) -> dict[str, float]:
    """Tune the miniature in ``start``, measure it, and draw ``quality.png`` into ``out``.

    Args:
        start: a folder that ``emu3 demo`` filled: its ``runs`` hold a vision tokenizer and a
            decoder.
        out: a new folder.
        progress: takes the seconds of each stage.
        overrides: ``key=value`` words for the recipe.
        samples: images of each digit in each colour that are sampled.
        rounds: how often each is generated to be measured.

    Returns:
        Shares of right digits and colours of images that are generated before, after training on
        the better half, and after training on all of them; and of right digits of both halves.
    """
    vision, decoder = (start / "runs" / n / f"{n}.safetensors" for n in ("vision", "decoder"))
    tokenizer, model = load_vision(vision), load_decoder(decoder)
    text = ByteTokenizer(model.settings.vocabulary)
    with progress.stage("sample_images"):
        store = write_samples(out / "stores" / "samples", model, tokenizer, text, samples)
    with progress.stage("score_images"):
        scores = score_store(store, tokenizer, text, [likeness], batch_size=64)
        np.save(out / "scores.npy", scores)
        metrics = _judge_halves(store, scores, tokenizer, text)
    weights = {"before": decoder}
    for name, better in (("after", 0.5), ("unselected", 1.0)):
        with progress.stage(f"train_quality_{name}"):
            weights[name] = _train(out, decoder, name, better, overrides)
    with progress.stage("measure_quality"):
        found = _measure(weights, tokenizer, text, rounds)
    rows = {words: found[name].images[0, 0::4].flatten(0, 1) for name, words in _ROWS.items()}
    plots.draw_rows(out / "quality.png", "Sampled before and after quality tuning", rows)
    for name, of in found.items():
        metrics[f"quality_digit_accuracy_{name}"] = of.digit_accuracy
        metrics[f"quality_color_accuracy_{name}"] = of.color_accuracy
    return metrics


def write_samples(
    folder: Path, model: Emu3, tokenizer: VisionTokenizer, text: ByteTokenizer, count: int
) -> Store:
    """Sample ``count`` images of each digit in each colour, as pairs with their captions."""
    _, _, captions = every_caption(count)
    codes: list[Tensor] = []
    for at in range(0, len(captions), _AT_ONCE):
        part = captions[at : at + _AT_ONCE]
        codes += generate_images(model, text, part, tokenizer.settings.grid, PLAIN, _SEED + at)
    area = tokenizer.settings.image_size**2
    made = Provenance(
        source="the miniature",
        digest="0",
        vocabulary=text.vocabulary,
        text="bytes",
        vision=fingerprint(tokenizer),
        making=Making(min_pixels=area, max_pixels=area),
    )
    documents = (
        Document(generation_document(words, one, text), Kind.PAIR, caption=len(text.encode(words)))
        for words, one in zip(captions, codes, strict=True)
    )
    write_shard(folder / "samples", documents, made)
    return Store(folder)


def _judge_halves(
    store: Store, scores: np.ndarray, tokenizer: VisionTokenizer, text: ByteTokenizer
) -> dict[str, float]:
    """Shares of right digits among the images of the higher and of the lower scores."""
    order = np.argsort(-scores, kind="stable")
    right = score_store(store, tokenizer, text, [digit], batch_size=64)[order]
    half = len(right) // 2
    better, worse = (round(float(part.mean()), 4) for part in (right[:half], right[half:]))
    return {"quality_better_half_accuracy": better, "quality_worse_half_accuracy": worse}


def _train(out: Path, start: Path, name: str, better: float, words: Sequence[str]) -> Path:
    store, scores = (json.dumps(str(out / part)) for part in ("stores/samples", "scores.npy"))
    given = [f"data.sources=[{{store={store}, scores={scores}, better={better}}}]"]
    given.append(f"train.start={json.dumps(str(start))}")
    return pretrain(load_recipe(_RECIPE, [*given, *words], StoreRecipe), out / "runs" / name)


def _measure(
    weights: Mapping[str, Path], tokenizer: VisionTokenizer, text: ByteTokenizer, rounds: int
) -> dict[str, Generated]:
    """What each decoder generates, and how the judges find it."""
    data, size = DigitSettings(), tokenizer.settings.image_size
    judge, how = DigitJudge(load_split(data.validation)[0], data, size), {"how": PLAIN}
    return {
        name: measure_generation(load_decoder(path), tokenizer, text, judge, rounds=rounds, **how)
        for name, path in weights.items()
    }
