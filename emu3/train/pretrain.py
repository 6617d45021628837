"""The parts of a decoder's training from token stores: model, optimizer, rows, and one step.

The same on one process and on many: a process alone is a mesh of one rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from emu3.data.order import key_of
from emu3.data.stream import StoreStream, StreamSettings
from emu3.model import Emu3
from emu3.train.clip import clip_gradients
from emu3.train.compact_adamw import CompactAdamW
from emu3.train.guard import Guard
from emu3.train.layout import Batch, Layout, check_fits
from emu3.train.lora import add_adapters, freeze, num_dropout_sites
from emu3.train.optim import build_optimizer, learning_rate, parameter_groups
from emu3.train.parallel import (
    StepLoss,
    accumulate_gradients,
    evaluate,
    parallelize,
    step_seeds,
)
from emu3.train.sharded import allocate, initialise, initialise_adapters, load_whole
from emu3.train.stage import StepMetrics
from emu3.train.store_recipe import PretrainOptimSettings, StoreRecipe
from emu3_kernels.modules import speed_up_bfloat16


class Pretraining:
    """What is trained, on this rank, and what it reads.

    Every rank must call every method, in the same order.
    """

    STREAM: type[StoreStream] = StoreStream
    batch_of = staticmethod(Batch.of)
    """What rows of :attr:`stream` become."""

    def __init__(self, recipe: StoreRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        check_fits(recipe.parallel, recipe.model, recipe.data.context)
        self.layout = Layout.of(recipe.parallel, device.type)
        self.stream = self._stream(recipe.data)
        self.validation = self._validation()
        with torch.device("meta"):
            self.model = Emu3(recipe.model).train()
        if recipe.optim.master == "stochastic":
            self.model.to(torch.bfloat16)
        if recipe.lora is not None:
            add_adapters(self.model, recipe.lora)
        freeze(self.model, recipe.train.freeze)
        if recipe.parallel.dtype == "bfloat16":
            speed_up_bfloat16(self.model)
        parallelize(self.model, self.layout)
        allocate(self.model, self.layout)
        self.optimizer = optimizer_of(self.model, recipe.optim)
        self.guard = Guard(recipe.guard, device)

    def check(self) -> None:
        """Raise unless what is read fits the weights that the run starts from."""

    def begin(self) -> None:
        """Set the weights that the run starts from."""
        start, seed = self.recipe.train.start, self.recipe.train.seed
        if self.recipe.lora is not None:
            if start is None:
                raise ValueError("lora: train.start (--from) must name the weights it adapts")
            initialise_adapters(self.model, self.layout, seed)
        if start is None:
            initialise(self.model, self.layout, seed)
        else:
            load_whole(start, self.model, self.layout)

    def on_device(self, rows: tuple[Tensor, Tensor, Tensor]) -> list[Batch]:
        """Return the micro-batches of rows of :attr:`stream`; the host waits for no GPU."""
        if self.device.type == "cuda":
            rows = tuple(x.pin_memory().to(self.device, non_blocking=True) for x in rows)
        return self.batch_of(*rows).split(self.recipe.train.micro_batch_size)

    def step(self, step: int, batches: Sequence[Batch]) -> StepMetrics:
        """Train on the micro-batches of a step; the host waits for no GPU."""
        train, optim = self.recipe.train, self.recipe.optim
        num_adapters = num_dropout_sites(self.model)
        has_dropout = self.recipe.model.dropout > 0 or num_adapters > 0
        settings = self.recipe.model, train.seed, step, self.device, num_adapters
        seeds = step_seeds(*settings) if has_dropout else None
        found = self.accumulate(batches, seeds)
        norm = clip_gradients(self.model, self.layout, optim.clip).to(self.device)
        lr = learning_rate(step, train.steps, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # A fused optimizer takes it from a gradient scaler, and changes nothing where it is 1.
        self.optimizer.found_inf = self.guard.skips(found.loss, norm)
        if optim.is_compact:
            # Replicas round alike; other ranks hold other weights.
            place = self.layout.rank_of_storage
            self.optimizer.seed = key_of(train.seed, "rounding", step, place) >> 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {"loss": found.loss, **found.metrics(), "lr": lr, "grad_norm": norm}
        work = {"tokens": found.tokens, "pairs": found.pairs}
        return metrics | work | self.guard.metrics()

    def evaluate(self) -> StepMetrics:
        """Return the loss of the validation rows, and its parts."""
        found = self.forward([batch.to(self.device) for batch in self.validation])
        metrics = {"loss": found.loss, **found.metrics()}
        return {f"validation_{name}": value for name, value in metrics.items()}

    def accumulate(self, batches: Sequence[Batch], seeds: Tensor | None) -> StepLoss:
        """Add up the gradients of a step's micro-batches."""
        z_loss = self.recipe.train.z_loss
        return accumulate_gradients(self.model, self.layout, batches, seeds=seeds, z_loss=z_loss)

    def forward(self, batches: Sequence[Batch]) -> StepLoss:
        """Return the loss of micro-batches without dropout."""
        return evaluate(self.model, self.layout, batches)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside weights and optimizer."""
        stream = {name: value.item() for name, value in self.stream.state().items()}
        return {"stream": stream, "guard": self.guard.state()}

    def restore(self, state: dict[str, Any]) -> None:
        stream = {name: torch.tensor(value) for name, value in state["stream"].items()}
        self.stream.restore(stream)
        self.guard.restore(state["guard"])

    def _stream(self, settings: StreamSettings) -> StoreStream:
        return self.STREAM(
            settings,
            self.recipe.model.vocabulary,
            self.recipe.train.seed,
            rank=self.layout.data_rank,
            ranks=self.layout.data_ranks,
            micro_batch_size=self.recipe.train.micro_batch_size,
        )

    def _validation(self) -> list[Batch]:
        """Read this data rank's rows of the validation stores, on the host."""
        of = self.recipe.evaluation
        if not of.reads:
            return []
        changed = {**of.reads, "batch_size": of.rows, "workers": 0}
        rows = self._stream(self.recipe.data.model_copy(update=changed)).next_batch()
        return self.batch_of(*rows).split(self.recipe.train.micro_batch_size)


def optimizer_of(model: Emu3, optim: PretrainOptimSettings) -> AdamW | CompactAdamW:
    """Build the optimizer that the settings name."""
    if not optim.is_compact:
        return build_optimizer(model, optim)
    how = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    quantized = optim.optimizer == "adamw8bit"
    return CompactAdamW(parameter_groups(model, optim), **how, quantized=quantized)
