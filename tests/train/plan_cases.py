"""The memory of training steps on a mesh of processes, MEASURED to hold the plan against it.

``torch.profiler`` records every allocation of PyTorch's CPU allocator, of kernels in C++ too, from
before the model is built: their running sum is what a rank holds.
"""

import gc
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from emu3.config import BYTE_VOCABULARY, ModelSettings
from emu3.model import Emu3
from emu3.train.clip import clip_gradients
from emu3.train.layout import Batch, Layout, ParallelSettings
from emu3.train.lora import LoraSettings, add_adapters, freeze, num_dropout_sites
from emu3.train.parallel import accumulate_gradients, parallelize, step_seeds
from emu3.train.pretrain import optimizer_of
from emu3.train.sharded import allocate, initialise, initialise_adapters
from emu3.train.store_recipe import PretrainOptimSettings
from emu3_kernels.modules import speed_up_bfloat16

MODEL = ModelSettings(
    vocabulary=BYTE_VOCABULARY.model_copy(update={"num_visual": 2048}),
    hidden_size=128,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    intermediate_size=384,
    max_position_embeddings=512,
    dropout=0.1,
)
ROWS, TOKENS = 2, 512
_LAST = "the last step"


def peak_of_step(
    _group,
    sizes: dict,
    rows: int = ROWS,
    micro_batches: int = 1,
    lora: LoraSettings | None = None,
    frozen: tuple[str, ...] = (),
    optim: dict | None = None,
) -> int:
    """Return the most bytes that this rank holds in its second step, whose optimizer has a state.

    Every tensor of the rank counts: weights, gradients, moments, activations, buffers, a batch.
    """
    gc.collect()  # of the call before this one: its memory would be freed, and counted, here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        layout = Layout.of(ParallelSettings(**sizes), "cpu")
        with torch.device("meta"):
            model = Emu3(MODEL).train()
        settings = PretrainOptimSettings(**optim or {})
        if settings.master == "stochastic":
            model.to(torch.bfloat16)
        if lora is not None:
            add_adapters(model, lora)
        freeze(model, frozen)
        if sizes.get("dtype") == "bfloat16":
            speed_up_bfloat16(model)
        parallelize(model, layout)
        allocate(model, layout)
        initialise(model, layout, 0)
        initialise_adapters(model, layout, 0)
        optimizer = optimizer_of(model, settings)
        batches = [_batch(rows) for _ in range(micro_batches)]
        for step in range(2):
            with record_function(_LAST if step else "the first"):
                sites = num_dropout_sites(model)
                seeds = step_seeds(MODEL, 0, step, torch.device("cpu"), sites)
                accumulate_gradients(model, layout, batches, seeds=seeds)
                clip_gradients(model, layout, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    events = recorded.profiler.kineto_results.events()
    (start,) = (event.start_ns() for event in events if event.name() == _LAST)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = accumulate(num_bytes for _, num_bytes in changes)
    return max(sum_ for (at, _), sum_ in zip(changes, held, strict=True) if at >= start)


def _batch(rows: int) -> Batch:
    """Draw rows of six documents."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(MODEL.vocabulary.size, (rows, TOKENS + 1), generator=random)
    documents = (torch.arange(TOKENS + 1) // 90).int().expand(rows, -1).contiguous()
    return Batch.of(ids, torch.ones(ids.shape), documents)
