"""What 8 and 4 bits cost and save: matrices and a decode step at Emu3-8B's shapes, the miniature.

Random weights where time alone counts, the trained miniature where errors do.
"""

import copy
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import clock, machine
from benchmarks.harness.calls import estimate
from benchmarks.harness.clock import Call
from benchmarks.harness.interleave import time_rounds
from emu3.cache import KeyValueCache
from emu3.config import PRESETS
from emu3.demo.config import DigitRecipe
from emu3.demo.digits import load_split
from emu3.demo.judge import DigitJudge
from emu3.demo.measure import measure_captions, measure_generation, paint_validation
from emu3.model import Emu3
from emu3.prompt import content_ids
from emu3.text import ByteTokenizer
from emu3.weights import load_decoder, load_vision, quantize
from emu3_kernels import quantize_weight, quantized_linear
from emu3_kernels.modules import QuantizedLinear, RotaryEmbedding, speed_up_bfloat16
from emu3_kernels.ops.quantized.cases import PROJECTIONS
from emu3_kernels.runtime.gemm import linear

PLAIN, READ = "bf16", "read"
KINDS = (PLAIN, "int8", "int4")
ROWS = 2
"""A guidance pair."""
CONTEXT = 1024
LAYERS = 2
ROUNDS = 4
"""Images of each digit in each colour."""

Numbers = dict[str, dict[str, float]]
"""By kind of weights, then by name."""


def measure(demo: Path | None, seconds: float, num_rows: int = ROWS) -> dict[str, Any]:
    """All figures of the page; those of the miniature if there is a ``demo``."""
    found: dict[str, Any] = {"machine": machine.facts(), "threads": torch.get_num_threads()}
    with torch.no_grad():
        found["matrices"] = [matrix(*shape, num_rows, seconds) for shape in PROJECTIONS]
        found["decode"] = decode(model_8b(), seconds)
        found["miniature"] = None if demo is None else miniature(demo)
    return found


def matrix(num_in: int, num_out: int, num_rows: int, seconds: float) -> dict[str, Any]:
    """Time one matrix times ``num_rows`` rows, and a plain read of its bfloat16 weight."""
    weight = torch.randn(num_out, num_in).bfloat16()
    x = torch.randn(num_rows, num_in).bfloat16()
    calls: dict[str, Call] = {
        READ: weight.view(torch.int64).sum,
        PLAIN: partial(linear, x, weight),
    }
    sizes = {READ: weight.nbytes, PLAIN: weight.nbytes}
    for bits in KINDS[1:]:
        codes, scales = quantize_weight(weight, bits)
        calls[bits] = partial(quantized_linear, x, codes, scales)
        sizes[bits] = codes.nbytes + scales.nbytes
    taken = timed(calls, seconds)
    return {
        "shape": [num_rows, num_in, num_out],
        "ms": {name: 1e3 * each for name, each in taken.items()},
        "gb_per_s": {name: sizes[name] / each / 1e9 for name, each in taken.items()},
    }


def timed(calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
    """Median seconds of each call, in interleaved rounds."""
    for call in calls.values():
        call()
    estimates = {name: estimate(call, clock.WALL) for name, call in calls.items()}
    taken = time_rounds(calls, estimates, seconds, clock.WALL)
    return {name: median(each) for name, each in taken.items()}


def model_8b(num_layers: int = LAYERS, **changes: int) -> Emu3:
    """Emu3-8B with fewer layers; every output of a matrix has the same weights."""
    update = {"num_layers": num_layers, "dropout": 0.0, **changes}
    settings = PRESETS["8b"].model_copy(update=update)
    with torch.device("meta"):
        model = Emu3(settings).bfloat16()
    model = model.to_empty(device="cpu").requires_grad_(False).eval()
    for weight in model.parameters():
        weight.copy_(0.02 * torch.randn(weight.shape[-1]) if weight.dim() == 2 else 1)
    model.rotate = RotaryEmbedding(settings.max_position_embeddings, settings.head_dim)
    return speed_up_bfloat16(model)


def as_kinds(model: Emu3) -> dict[str, Emu3]:
    """The model with each kind of weights; all share its embedding."""
    kinds = {PLAIN: model}
    for bits in KINDS[1:]:
        kinds[bits] = quantize(copy.deepcopy(model, {id(model.embedding): model.embedding}), bits)
    return kinds


def decode(model: Emu3, seconds: float, context: int = CONTEXT) -> Numbers:
    """Time a decode step of a guidance pair, and count the bytes of weights that it reads."""
    kinds = as_kinds(model)
    taken = timed({name: step(one, context) for name, one in kinds.items()}, seconds)
    return {
        name: {
            "bytes": read_bytes(one),
            "ms": 1e3 * taken[name],
            "tokens_per_s": 1 / taken[name],
            "gb_per_s": read_bytes(one) / taken[name] / 1e9,
        }
        for name, one in kinds.items()
    }


def step(model: Emu3, context: int) -> Call:
    """One token of a guidance pair: every layer, and the visual rows of the head."""
    ids = model.settings.vocabulary
    cache = KeyValueCache(model.settings, ROWS, context + 1, dtype=torch.bfloat16)
    token, visual = torch.full((ROWS, 1), ids.visual_start), slice(ids.visual_start, ids.size)

    def call() -> Tensor:
        cache.lengths.fill_(context)
        cache.longest = context
        return model.logits(model(token, cache)[:, -1], visual)

    return call


def read_bytes(model: Emu3) -> int:
    """Bytes of weights that a step reads: linear layers, and the visual rows of the head."""
    ids, total = model.settings.vocabulary, 0
    for module in model.modules():
        share = ids.num_visual / ids.size if module is model.head else 1
        if isinstance(module, QuantizedLinear):
            total += round(share * (module.codes.nbytes + module.scales.nbytes))
        elif isinstance(module, nn.Linear):
            total += round(share * module.weight.nbytes)
    return total


def miniature(demo: Path) -> Numbers:
    """Errors of logits against float64, and the demo's accuracies, for each kind of weights."""
    runs, recipe = demo / "runs", DigitRecipe()
    path = runs / "decoder/decoder.safetensors"
    tokenizer = load_vision(runs / "vision/vision.safetensors")
    exact = load_decoder(path).double()
    text, size = ByteTokenizer(exact.settings.vocabulary), tokenizer.settings.image_size
    train_set, validation_set = load_split(recipe.data.validation)
    judge = DigitJudge(train_set, recipe.data, size)
    images, colors = paint_validation(validation_set, size)
    tokens = _documents(tokenizer.encode(images), text)
    truth, found = _logits(exact, tokens), {}
    for name in KINDS:
        how = {} if name == PLAIN else {"weights": name}
        model = load_decoder(path, dtype=torch.bfloat16, **how)
        error = _logits(model, tokens) - truth
        drawn = measure_generation(model, tokenizer, text, judge, rounds=ROUNDS)
        told = measure_captions(model, tokenizer, text, images, validation_set.labels, colors)
        found[name] = {
            "logit_error": float(error.square().mean().sqrt() / truth.std()),
            "generated_digit_accuracy": drawn.digit_accuracy,
            "generated_color_accuracy": drawn.color_accuracy,
            "caption_digit_accuracy": told.digit_accuracy,
            "caption_color_accuracy": told.color_accuracy,
        }
    return found


def _documents(codes: Tensor, text: ByteTokenizer) -> Tensor:
    """The tokens of each image, ``[B, T]``."""
    return torch.tensor([[text.vocabulary.bos, *content_ids([one], text)] for one in codes])


def _logits(model: Emu3, tokens: Tensor) -> Tensor:
    """Visual logits of all tokens, in float64."""
    ids = model.settings.vocabulary
    return model.logits(model(tokens), slice(ids.visual_start, ids.size)).double()


def write(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write ``weights.json``, ``weights.md`` and, with a miniature, ``weights.png``."""
    from benchmarks.report import weights_page

    (folder / "weights.json").write_text(json.dumps(found, indent=1) + "\n")
    return weights_page.write(folder, found)
