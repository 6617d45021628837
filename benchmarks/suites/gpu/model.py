"""A training step of a few layers of Emu3-8B beside Hugging Face, with the table of its kernels."""

from collections.abc import Iterator, Mapping

import torch

from benchmarks.harness import apart
from benchmarks.suites import model
from benchmarks.suites.gpu import rows
from benchmarks.suites.gpu.plan import BOTH, Item
from emu3.config import BYTE_VOCABULARY, PRESETS, ModelSettings

TINY = {
    "vocabulary": BYTE_VOCABULARY,
    "hidden_size": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}


def settings_of(item: Item, num_layers: int) -> ModelSettings:
    """Return Emu3-8B with ``num_layers``, without dropout; in a dry run all of it is tiny."""
    changed = {"num_layers": num_layers, "dropout": 0.0} | (TINY if item.dry else {})
    return PRESETS["8b"].model_copy(update=changed)


def prepare(item: Item, device: str, skip: Mapping[str, str]) -> Iterator:
    """Take a step of one layer, which launches the kernels of every layer."""
    with rows.process_state(device):
        yield "a step of one layer"
        settings = settings_of(item, 1)
        with torch.device(device):
            everyone = model.trained_models(settings, item.dtype)
        found = model.entries_of(everyone, settings, *_tokens(item), device)
        yield {"default": model.OURS, "missing": found.missing}


def _tokens(item: Item) -> tuple[int, int]:
    """Return how many tokens there are, and how many of them are valid: all."""
    return item.size["tokens"], item.size["tokens"]


def measure(item: Item, device: str, prepared: Mapping) -> Iterator:
    """Yield the row, then with kernel and host time and the table of our kernels."""
    with rows.process_state(device):
        yield "building the models"
        settings = settings_of(item, item.size["layers"])
        with torch.device(device):
            everyone = model.trained_models(settings, item.dtype)
        yield "the first steps"
        found = model.entries_of(everyone, settings, *_tokens(item), device)
        shapes = model.gemm_shapes(settings, *_tokens(item))
        case = rows.case_of(item, model.OURS, BOTH, device)
        yield "the rounds"
        row = rows.timed_row(item, case, found, lambda _, taken: model.bound(shapes, taken))
        for standing in (row, *row["peers"].values()):
            standing["tokens_per_s"] = item.size["tokens"] / standing["ms"] * 1e3
        yield row
        yield "the table of kernels"
        row["kernels"] = apart.kernels(found.calls[model.OURS], device)
        yield row
