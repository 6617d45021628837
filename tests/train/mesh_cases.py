"""What every rank of a mesh runs in the tests of parallel training, and one process alone.

Packed rows whose documents straddle every shard, weighted tokens, dropout, clipped AdamW.
"""

from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from emu3.config import BYTE_VOCABULARY, ModelSettings
from emu3.model import Emu3, StepDropout
from emu3.train.clip import clip_gradients
from emu3.train.layout import Batch, Layout, ParallelSettings, check_fits
from emu3.train.parallel import (
    accumulate_gradients,
    parallelize,
    step_seeds,
)
from emu3.train.sharded import (
    Saver,
    allocate,
    checkpoints,
    load_sharded,
    load_whole,
    save_whole,
    sharded_views,
)
from emu3.weights import official_views
from emu3_kernels import Documents
from emu3_kernels.testing.budget import assert_as_accurate

MODEL = ModelSettings(
    vocabulary=BYTE_VOCABULARY,
    hidden_size=64,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=8,
    intermediate_size=96,
    max_position_embeddings=48,
    dropout=0.1,
    init_std=0.1,
)
NUM_ROWS, NUM_TOKENS, STEPS, SEED = 8, 48, 5, 11
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@dataclass(frozen=True)
class Trained:
    """The losses and gradient norms of the steps, and every weight after them."""

    losses: Tensor
    norms: Tensor
    weights: dict[str, Tensor]

    def assert_as_accurate(self, alone: "Trained", exact: "Trained") -> None:
        """Allow twice the error of one process in the same dtype.

        Of the weights the mean error counts: where a gradient is nearly 0, AdamW divides one
        rounding error by another, and the largest of all is a matter of chance.
        """
        for name in ("losses", "norms"):
            assert_as_accurate(name, *(getattr(of, name) for of in (self, alone, exact)))
        assert self._weight_errors(exact).mean() <= 2 * alone._weight_errors(exact).mean()

    def errors(self, exact: "Trained") -> dict[str, float]:
        """Return the largest errors of losses and norms, the mean and the largest of weights."""
        weights = self._weight_errors(exact)
        return {
            "loss": (self.losses - exact.losses).abs().max().item(),
            "norm": (self.norms - exact.norms).abs().max().item(),
            "mean": weights.mean().item(),
            "largest": weights.max().item(),
        }

    def _weight_errors(self, exact: "Trained") -> Tensor:
        pairs = ((self.weights[name], truth) for name, truth in exact.weights.items())
        return torch.cat([(weight - truth).abs().flatten() for weight, truth in pairs])


def batch_of(step: int) -> Batch:
    """Draw the rows ``[8, 48]`` of a step: two to seven documents each, weights 0.5 and 1."""
    random = torch.Generator().manual_seed(step)
    ids = torch.randint(BYTE_VOCABULARY.size, (NUM_ROWS, NUM_TOKENS + 1), generator=random)
    starts = torch.zeros(ids.shape, dtype=torch.bool)
    for row in range(NUM_ROWS):
        starts[row, torch.randperm(NUM_TOKENS, generator=random)[: 1 + row % 6]] = True
    weights = torch.where(starts, 0, 0.5 + 0.5 * (ids < 400).float())
    return Batch.of(ids, weights, starts.cumsum(1).int())


def new_model(dtype: torch.dtype = torch.float32) -> Emu3:
    torch.manual_seed(0)
    return Emu3(MODEL).train().to(dtype)


def train_alone(dtype: torch.dtype, steps: int = STEPS) -> Trained:
    """Train in one process, without anything of ``emu3.train.parallel`` but the seeds."""
    model = new_model(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses, norms = [], []
    for step in range(steps):
        batch = batch_of(step)
        dropout = StepDropout(step_seeds(MODEL, SEED, step, "cpu"))
        documents = Documents(batch.documents)
        loss = model.objective(*batch[:4], documents, batch.weights.sum(), dropout=dropout)
        loss.backward()
        losses.append(loss.detach())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: view.clone() for name, view in official_views(model).items()}
    return Trained(torch.stack(losses), torch.stack(norms), weights)


def continued_on(_group, folder: str, sizes: dict, until: int) -> list[float]:
    """Continue the last checkpoint of ``folder``, if there is one, and save one; the losses."""
    layout, model = Layout.of(ParallelSettings(**sizes), "cpu"), new_model()
    parallelize(model, layout)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    path, step, losses = Path(folder), 0, []
    if checkpoints(path):
        step = load_sharded(checkpoints(path)[-1], model, optimizer, layout)["step"]
    for now in range(step, until):
        losses.append(accumulate(model, layout, now, 1).item())
        clip_gradients(model, layout, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    saver = Saver(path, model, optimizer, layout)
    saver.save(until)
    saver.wait()
    saver.shutdown()
    return losses


def train_on(_group, sizes: dict, *, micro_batches: int = 1, steps: int = STEPS) -> Trained:
    """Train on a mesh; every rank returns the losses, the norms and the whole weights."""
    settings = ParallelSettings(**sizes)
    check_fits(settings, MODEL, NUM_TOKENS)
    layout, model = Layout.of(settings, "cpu"), new_model()
    with aot_eager():
        parallelize(model, layout)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses, norms = [], []
    for step in range(steps):
        losses.append(accumulate(model, layout, step, micro_batches))
        norms.append(clip_gradients(model, layout, 1.0))
        optimizer.step()
        optimizer.zero_grad()
    views = sharded_views(model, layout)
    weights = {name: view.full_tensor() for name, view in views.items()}
    return Trained(torch.stack(losses), torch.stack(norms), weights)


def accumulate(model: Emu3, layout: Layout, step: int, micro_batches: int) -> Tensor:
    """Add up the gradients of this data rank's rows, and return the loss of all ranks."""
    whole, num_batches = batch_of(step), layout.data_ranks * micro_batches
    own = range(layout.data_rank, num_batches, layout.data_ranks)
    batches = [Batch(*(x.chunk(num_batches)[number] for x in whole)) for number in own]
    seeds = step_seeds(MODEL, SEED, step, "cpu")
    return accumulate_gradients(model, layout, batches, seeds=seeds).loss


def aot_eager():
    """Compile without Inductor, whose C++ takes a minute; graphs are the same."""
    compiles = nn.Module.compile
    return mock.patch.object(nn.Module, "compile", lambda self: compiles(self, backend="aot_eager"))


def train_on_with(group, sizes: dict, settings: dict) -> Trained:
    return train_on(group, sizes, **settings)


def saves_and_loads_whole(_group, folder: str, first: dict, second: dict) -> list[str]:
    """Save from one mesh, load into a model on the meta device on another; what differs."""
    layouts = [Layout.of(ParallelSettings(**sizes), "cpu") for sizes in (first, second)]
    model = new_model()
    parallelize(model, layouts[0])
    save_whole(Path(folder) / "model.safetensors", model, layouts[0])
    with torch.device("meta"):
        other = Emu3(MODEL).train()
    parallelize(other, layouts[1])
    allocate(other, layouts[1])
    load_whole(Path(folder), other, layouts[1])
    views = (sharded_views(*pair) for pair in zip((model, other), layouts, strict=True))
    whole = [{name: view.full_tensor() for name, view in of.items()} for of in views]
    differ = [name for name, x in whole[0].items() if not torch.equal(x, whole[1][name])]
    losses = [accumulate(*pair, 0, 1) for pair in zip((model, other), layouts, strict=True)]
    return differ + ["loss"] * (not torch.allclose(*losses, rtol=1e-6))


def view_shapes(_group, sizes: dict) -> dict[str, tuple[int, ...]]:
    layout, model = Layout.of(ParallelSettings(**sizes), "cpu"), new_model()
    parallelize(model, layout)
    return {name: tuple(view.shape) for name, view in sharded_views(model, layout).items()}


def refusal(_group, sizes: dict) -> str:
    try:
        Layout.of(ParallelSettings(**sizes), "cpu")
    except ValueError as error:
        return str(error)
    return "nothing"
