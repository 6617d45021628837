"""One guided token of Emu3-8B: both branches, the visual logits, guidance and a sample."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from benchmarks.harness import apart, clock
from benchmarks.harness.clock import Call
from benchmarks.harness.entries import Entries
from benchmarks.harness.worker import first_line, gpu_is_lost
from benchmarks.suites import model as training
from benchmarks.suites.gpu import rows
from benchmarks.suites.gpu.model import settings_of
from benchmarks.suites.gpu.plan import FORWARD, Item
from emu3.cache import KeyValueCache
from emu3.config import ModelSettings
from emu3.model import Emu3
from emu3_kernels import sample_guided

OURS, THEIRS = "emu3.Emu3", "Hugging Face"
GUIDANCE, TOP_K = 3.0, 2048
ROOM = 16
"""Slots of the cache beyond the context."""
LAYERS = {False: 32, True: 2}
"""Layers of a run and of a dry run."""


def prepare(item: Item, device: str, skip: Mapping[str, str]) -> Iterator:
    """Decode with one layer, which launches the kernels of every layer."""
    with rows.process_state(device), torch.no_grad():
        yield "a token through one layer"
        ours(item, settings_of(item, 1), device)()
        yield {"default": OURS, "missing": dict(skip)}


def measure(item: Item, device: str, prepared: Mapping) -> Iterator:
    """Yield the row, then with kernel and host time and the table of our kernels."""
    with rows.process_state(device), torch.no_grad():
        found = Entries(clock=clock.of(device), missing=dict(prepared["missing"]))
        settings = settings_of(item, LAYERS[item.dry])
        yield "our first token"
        found.add(OURS, ours(item, settings, device))
        yield rows.ENTRY + THEIRS
        try:
            found.add(THEIRS, theirs(item, settings, device))
        except Exception as error:  # a peer that fails is a result too
            if gpu_is_lost():
                raise
            found.drop(THEIRS, first_line(error))
        yield "the rounds"
        case = rows.case_of(item, OURS, FORWARD, device)
        row = rows.timed_row(item, case, found, lambda case, taken: None)
        yield row
        yield "the table of kernels"
        row["kernels"] = apart.kernels(found.calls[OURS], device)
        yield row
        yield from rows.add_kernel_and_host_time(row, found, device)
        yield row


def next_tokens(item: Item, settings: ModelSettings, device: str) -> Tensor:
    first = settings.vocabulary.visual_start
    return torch.full((item.size["batch"], 1), first, device=device)


def ours(item: Item, settings: ModelSettings, device: str) -> Call:
    """Decode one token with our model and take it back."""
    model = build(lambda: Emu3(settings), item.dtype, device)
    batch, context = item.size["batch"], item.size["context"]
    place = {"dtype": item.dtype, "device": device}
    cache = KeyValueCache(settings, batch, context + ROOM, **place)
    for filled in (cache.keys, cache.values):
        filled.normal_()
    lengths = torch.full_like(cache.lengths, context)
    tokens = next_tokens(item, settings, device)
    visual = slice(settings.vocabulary.visual_start, settings.vocabulary.size)
    seeds, places = torch.zeros(2, batch // 2, dtype=torch.int64, device=device)

    def call() -> Tensor:
        cache.lengths.copy_(lengths)
        cache.longest = context
        pair = model.logits(model(tokens, cache)[:, -1], visual).chunk(2)
        return sample_guided(*pair, seeds, places, guidance=GUIDANCE, top_k=TOP_K)

    return call


def theirs(item: Item, settings: ModelSettings, device: str) -> Call:
    """Decode one token with Hugging Face's model and its growing cache, and take it back."""
    with torch.device(device):
        model = training.hugging_face(settings, item.dtype).eval()
    batch, context = item.size["batch"], item.size["context"]
    visual = settings.vocabulary.visual_start
    prompt = torch.full((batch, context), visual, device=device)
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    tokens = next_tokens(item, settings, device)

    def call() -> Tensor:
        logits = model(tokens, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return guided(logits[:, -1, visual:])

    return call


def guided(logits: Tensor) -> Tensor:
    """Sample a token for each pair of rows, with the caption and without, in plain PyTorch."""
    cond, uncond = logits.float().chunk(2)
    best, ids = torch.lerp(uncond, cond, GUIDANCE).topk(TOP_K)
    return ids.gather(1, torch.multinomial(best.softmax(-1), 1))


def build(make, dtype: torch.dtype, device: str) -> nn.Module:
    with torch.device(device):
        torch.manual_seed(0)
        return make().to(dtype).eval()
