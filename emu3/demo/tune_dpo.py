"""The miniature's preferences: samples of its own, votes of small classifiers, DPO.

No pair is of a held-out prompt, a digit in a colour; judges that never voted measure what is
generated from these before and after.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from emu3.config import load_recipe
from emu3.data.pairs import Sampled, load_pairs, weights_fingerprint
from emu3.demo import plots
from emu3.demo.config import DigitSettings
from emu3.demo.digits import (
    COLORS,
    DIGITS,
    caption,
    load_split,
    read_caption,
)
from emu3.demo.judge import DigitJudge, judge_color
from emu3.demo.measure import share
from emu3.demo.miniature import Clock
from emu3.demo.voters import likeness, strokes
from emu3.generate import Sampling, generate_images
from emu3.text import ByteTokenizer
from emu3.tools.prefer.run import PAIRS, Asked, prefer
from emu3.train.metrics import read_metrics
from emu3.train.preference_recipe import PreferenceRecipe
from emu3.train.pretrain_loop import pretrain
from emu3.weights import Pretrained, load_decoder, load_vision

PLAIN = Sampling(guidance=1.0, top_k=None)
"""From the model's own distribution: that is what is trained."""
_RECIPE = "dpo-mini"
_SEED = 1 << 21
"""Of the first sample; seeds below are those of what is measured."""
_HELD_OUT = 2
"""Colours of each digit without a pair."""
_GAP = 0.5


def run(
    start: Path,
    out: Path,
    progress: Clock,
    *,
    overrides: Sequence[str] = (),
    prompts: int = 420,
    samples: int = 8,
    rounds: int = 32,
) -> dict[str, float]:
    """Tune the miniature in ``start``, measure it, and draw ``preferences.png`` into ``out``.

    Args:
        start: a folder that ``emu3 demo`` filled: its ``runs`` hold a vision tokenizer and a
            decoder.
        out: a new folder.
        progress: takes the seconds of each stage.
        overrides: ``key=value`` words for the recipe.
        prompts: that are sampled from, each caption about as often.
        samples: of each prompt.
        rounds: how often each held-out prompt is generated to be measured.

    Returns:
        Shares of right digits and colours of images of held-out prompts, before and after; the
        pairs, and the metrics of the last step.
    """
    vision, decoder = (start / "runs" / n / f"{n}.safetensors" for n in ("vision", "decoder"))
    model, tokenizer = load_decoder(decoder), load_vision(vision)
    loaded = Pretrained(model, tokenizer, ByteTokenizer(model.settings.vocabulary))
    asked, held_out = split_captions()
    some = [asked[number % len(asked)] for number in range(prompts)]
    with progress.stage("fit_voters"):
        voters = {"likeness": likeness, "strokes": strokes}
        for voter in voters.values():
            size = tokenizer.settings.image_size
            voter(torch.zeros(1, 3, size, size), asked[:1])
    with progress.stage("make_pairs"):
        sampled = Sampled(
            samples=samples, seed=_SEED, guidance=1.0, top_k=None, top_p=None, temperature=1.0
        )
        how = Asked(sampled, tokenizer.settings.grid, gap=_GAP, batch=128)
        folder = out / "preferences"
        prefer(some, folder, loaded, voters, how, decoder=weights_fingerprint(decoder))
    words = [f"data.pairs={json.dumps(str(folder))}", f"train.start={json.dumps(str(decoder))}"]
    with progress.stage("train_dpo"):
        recipe = load_recipe(_RECIPE, [*words, *overrides], PreferenceRecipe)
        weights = pretrain(recipe, out / "runs" / "dpo")
    metrics: dict[str, float] = {"dpo_pairs": len(load_pairs(folder / PAIRS))}
    shown = {}
    with progress.stage("measure_dpo"):
        for name, path in (("before", decoder), ("after", weights)):
            of = Pretrained(load_decoder(path), tokenizer, loaded.text)
            shown[name], found = measure(of, held_out, rounds)
            metrics |= {f"dpo_{what}_{name}": value for what, value in found.items()}
    plots.draw_rows(out / "preferences.png", "Held-out prompts before and after DPO", shown)
    last = read_metrics(out / "runs" / "dpo" / "metrics.jsonl")[-1]
    names = "margin", "pair_accuracy", "chosen_change", "rejected_change", "ntp_loss"
    return metrics | {f"dpo_{name}": round(last[name], 4) for name in names}


def split_captions() -> tuple[list[str], list[str]]:
    """Return the captions to make pairs of, and the held-out ones: two colours of each digit."""
    asked, held_out = [], []
    for color in range(len(COLORS)):
        for digit in range(len(DIGITS)):
            is_held_out = (color - digit) % len(COLORS) < _HELD_OUT
            (held_out if is_held_out else asked).append(caption(digit, color))
    return asked, held_out


def measure(
    loaded: Pretrained, captions: Sequence[str], rounds: int
) -> tuple[Tensor, dict[str, float]]:
    """Generate each caption ``rounds`` times; return the first of each, and what the judges say."""
    said = list(captions) * rounds
    digits, colors = torch.tensor([read_caption(words) for words in said]).unbind(1)
    data, size = DigitSettings(), loaded.vision.settings.image_size
    judge = DigitJudge(load_split(data.validation)[0], data, size)
    given = loaded.model, loaded.text, said, loaded.vision.settings.grid
    images = loaded.vision.decode(generate_images(*given, PLAIN)).clamp(-1, 1)
    found = {
        "digit_accuracy": share(judge(images) == digits),
        "color_accuracy": share(judge_color(images) == colors),
    }
    return images[: len(captions)], found
