"""The miniature's pre-training from token stores: the commands of a user, then measurements.

Stage 1 reads images with captions, both orders, and texts; stage 2 clips too, in longer rows.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from emu3.config import load_recipe, recipe_tree
from emu3.data.store import Store
from emu3.demo import plots
from emu3.demo.config import ClipRecipe
from emu3.demo.digits import load_split
from emu3.demo.files import write_clips, write_images, write_texts
from emu3.demo.judge import DigitJudge
from emu3.demo.measure import measure_captions, measure_generation, paint_validation
from emu3.demo.miniature import Clock, Miniature
from emu3.demo.run import machine, show
from emu3.demo.run_moving import film, run_clips
from emu3.demo.stages import seed_visual_rows
from emu3.files import replacing
from emu3.model import Emu3
from emu3.text import ByteTokenizer
from emu3.train.lock import locked
from emu3.train.metrics import read_metrics
from emu3.train.store_recipe import StoreRecipe
from emu3.weights import load_decoder, load_vision, save_decoder

Run = Callable[[Sequence[str], int], None]
"""Runs ``emu3`` with these words in so many processes."""

IMAGES, CLIPS = 10776, 2694
"""Samples of a store: 8 images and 2 clips of each of the 1,347 training digits."""
_DOCUMENTS = 449
"""Samples of a shard: a third of the digits, so that two processes have as many."""
WORKERS = min(4, os.cpu_count() or 1)
"""Processes of ``emu3 prepare``: it encodes a sample at a time, which takes one core."""
_ROUNDS = 4
STAGES = "stage1-mini", "stage2-mini"


def run_stages(
    folder: Path,
    overrides: Sequence[Sequence[str]] = ((), (), ()),
    *,
    images: int = IMAGES,
    clips: int = CLIPS,
    processes: int = 1,
    run: Run | None = None,
) -> dict:
    """Prepare stores and train both stages; write images, stores, runs and ``report.json``.

    Args:
        overrides: ``key=value`` words for the vision tokenizer and for each stage.
        images: images in the store.
        clips: clips in the store.
        processes: of each stage.
        run: runs a command; None starts processes, by torchrun if there is more than one.

    Returns:
        the contents of ``report.json``.

    Raises:
        ValueError: one line, if a command fails.
    """
    recipe = load_recipe("clips-vision", overrides[0], ClipRecipe)
    # Digits of images are as large as those of clips: stage 2 needs what stage 1 learned of them.
    data = recipe.data.model_copy(update={"side": recipe.clips.side})
    recipe = recipe.model_copy(update={"data": data})
    with locked(folder):
        demo = _Demo(folder, recipe, processes, run or run_command, Clock())
        demo.prepare(overrides[0], images, clips)
        decoders = demo.train(overrides[1:])
        report = demo.measure(*decoders)
        with replacing(folder / "report.json") as draft:
            draft.write_text(json.dumps(report, indent=2) + "\n")
    show(folder, report)
    return report


def run_command(words: Sequence[str], processes: int) -> None:
    """Run ``emu3`` in child processes; its output is theirs."""
    many = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(many if processes > 1 else ()), "emu3", *words]
    if code := subprocess.run(command, check=False).returncode:
        raise ValueError(f"demo: emu3 {words[0]} ended with exit code {code}")


def layout(stage: str, processes: int) -> list[str]:
    """Words that lay the rows of a step out; with fewer rows than ranks, several share each row."""
    if processes == 1:
        return []
    rows = recipe_tree(stage)["data"]["batch_size"]
    context = max(1, processes // rows)
    shard = processes // context
    words = [f"parallel.shard={shard}", f"parallel.context={context}"]
    words.append(f"train.micro_batch_size={max(1, rows // shard)}")
    # Of two KV heads no more than two ranks take their share.
    return [*words, "parallel.context_style=ring"] if context > 2 else words


class _Demo:
    """The commands, and the files between them."""

    def __init__(
        self, folder: Path, recipe: ClipRecipe, processes: int, run: Run, clock: Clock
    ) -> None:
        self.folder, self.recipe, self.processes = folder, recipe, processes
        self.data, self.stores, self.runs = (folder / n for n in ("data", "stores", "runs"))
        self.vision = self.runs / "vision" / "vision.safetensors"
        self._run, self.clock = run, clock

    def emu3(self, name: str, words: Sequence[str], processes: int = 1) -> None:
        """Show a command, run it, and keep its seconds under ``name``."""
        start = f"torchrun --nproc-per-node {processes} -m " if processes > 1 else ""
        line = f"$ {start}emu3 {shlex.join(words)}"
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
        with self.clock.stage(name):
            self._run(words, processes)

    def prepare(self, words: Sequence[str], images: int, clips: int) -> None:
        for made in (self.data, self.stores, self.runs):
            shutil.rmtree(made, ignore_errors=True)
        where = ["--out", str(self.vision.parent)]
        self.emu3("train_tokenizer", ["train", "clips-vision", *words, *where])
        with self.clock.stage("write_files"):
            inputs = {
                "images": write_images(self.data, self.recipe, images),
                "clips": write_clips(self.data, self.recipe, clips),
                "texts": write_texts(self.data),
            }
        area = str(self.recipe.vision.image_size**2)
        how = ["--preset", "mini", "--vision", str(self.vision), "--documents", str(_DOCUMENTS)]
        how += ["--min-pixels", area, "--max-pixels", area]
        for name, path in inputs.items():
            out = ["--out", str(self.stores / name)]
            processes = WORKERS if name != "texts" else 1
            self.emu3(f"prepare_{name}", ["prepare", str(path), *out, *how], processes)

    def train(self, overrides: Sequence[Sequence[str]]) -> list[Path]:
        """The decoder's weights after each stage."""
        start, written = self._write_start(overrides[0]), []
        for stage, words in zip(STAGES, overrides, strict=True):
            out = self.runs / stage
            given = [f"data.sources={self._sources(stage)}", *layout(stage, self.processes), *words]
            where = ["--from", str(start), "--out", str(out)]
            self.emu3(stage, ["train", stage, *given, *where], self.processes)
            start = out / "pretrain.safetensors"
            written.append(start)
        return written

    def _write_start(self, words: Sequence[str]) -> Path:
        """Random weights, except that embeddings of similar codes are similar."""
        recipe = load_recipe(STAGES[0], words, StoreRecipe)
        torch.manual_seed(recipe.train.seed)
        model, path = Emu3(recipe.model), self.runs / "start.safetensors"
        seed_visual_rows(model, load_vision(self.vision).codebook)
        save_decoder(path, model)
        return path

    def _sources(self, stage: str) -> str:
        """Those of the recipe, in this folder; TOML."""
        tables = []
        for source in recipe_tree(stage)["data"]["sources"]:
            store = json.dumps(str(self.stores / Path(source["store"]).name))
            tables.append(f"{{store={store}, weight={source['weight']}}}")
        return f"[{', '.join(tables)}]"

    def measure(self, *decoders: Path) -> dict:
        first, second = map(self._miniature, decoders)
        filmed = film(second)
        metrics = self._images("stage1", first)
        metrics |= self._images("stage2", second)
        metrics |= run_clips(self.folder, second, filmed, self.clock)
        losses = {
            stage: [line["loss"] for line in read_metrics(self.runs / stage / "metrics.jsonl")]
            for stage in STAGES
        }
        plots.draw_curves(self.folder / "loss.png", losses)
        seconds = self.clock.seconds
        return {
            **metrics,
            **self._counts(),
            "decoder_parameters": sum(p.numel() for p in second.model.parameters()),
            "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
            "processes": self.processes,
            "machine": machine(),
        }

    def _miniature(self, decoder: Path) -> Miniature:
        model = load_decoder(decoder)
        text = ByteTokenizer(model.settings.vocabulary)
        digits = load_split(self.recipe.data.validation)
        return Miniature(self.recipe, model, load_vision(self.vision), text, *digits)

    def _images(self, stage: str, mini: Miniature) -> dict[str, float]:
        """Accuracies of images and captions after a stage; writes its images."""
        data, size = mini.recipe.data, mini.tokenizer.settings.image_size
        labels = mini.validation_set.labels
        with self.clock.stage(f"measure_{stage}"):
            judge = DigitJudge(mini.train_set, data, size, data.side)
            models = mini.model, mini.tokenizer, mini.text
            generated = measure_generation(*models, judge, rounds=_ROUNDS)
            images, colors = paint_validation(mini.validation_set, size, data.side)
            captioned = measure_captions(*models, images, labels, colors)
            plots.draw_grid(self.folder / f"{stage}.png", generated.images[0])
        return {
            f"{stage}_generated_digit_accuracy": generated.digit_accuracy,
            f"{stage}_generated_color_accuracy": generated.color_accuracy,
            f"{stage}_caption_digit_accuracy": captioned.digit_accuracy,
            f"{stage}_caption_color_accuracy": captioned.color_accuracy,
        }

    def _counts(self) -> dict[str, float]:
        """Documents and tokens of the stores, and how many tokens each stage read."""
        counts = {}
        for path in sorted(self.stores.iterdir()):
            store = Store(path)
            counts |= {f"{path.name}_documents": len(store), f"{path.name}_tokens": store.tokens}
        for stage in STAGES:
            lines = read_metrics(self.runs / stage / "metrics.jsonl")
            tokens = sum(line["tokens"] for line in lines)
            counts[f"{stage}_tokens"] = tokens
            counts[f"{stage}_tokens_per_second"] = round(tokens / self.clock.seconds[stage])
        return counts
