"""The parts of a stage: modules to train, a stream of batches, and one step."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from emu3.config import Recipe
from emu3.cuda_graph import CapturedStep
from emu3.train.optim import build_optimizer, capturable, learning_rate, take_step

StepMetrics = dict[str, Tensor | float]


class Stream(Protocol):
    """Endless batches; the position can be saved and restored."""

    def next_batch(self) -> tuple[Tensor, ...]: ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor]) -> None: ...


class Stage(Protocol):
    """A kind of training. ``modules``, ``optimizers`` and ``stream`` are its whole state."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    stream: Stream

    def step(self, step: int, *batch: Tensor) -> StepMetrics:
        """Train on a batch; return metrics to log, ``loss`` among them."""
        ...

    def save(self, path: Path) -> None:
        """Write the trained weights."""
        ...


class SingleLossStage:
    """One model and one loss.

    With ``cuda_graph``, for a model on a GPU, forward, backward and optimizer are replayed as one
    CUDA graph. Batches must then keep their shapes, and ``loss`` must read nothing from the GPU, as
    ``objective.next_token_of_all`` does not; its metrics that are numbers stay those of the
    captured step. Off by default, since a loss that may read leaves out the tokens of weight 0.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        stream: Stream,
        loss: Callable[..., tuple[Tensor, StepMetrics]],
        save: Callable[[Path, nn.Module], None],
        *,
        cuda_graph: bool = False,
    ) -> None:
        self.recipe, self.model, self.stream, self.loss = recipe, model, stream, loss
        self.optimizer = build_optimizer(model, recipe.optim)
        self.modules, self.optimizers = {"model": model}, {"optimizer": self.optimizer}
        self._save = save
        self._captured: CapturedStep | None = None
        if cuda_graph:
            capturable(self.optimizer)
            device = next(model.parameters()).device
            self._lr = torch.zeros((), device=device)
            self._captured = CapturedStep(lambda *batch: self._train(self._lr, *batch), device)

    def step(self, step: int, *batch: Tensor) -> StepMetrics:
        lr = learning_rate(step, self.recipe.train.steps, self.recipe.optim)
        if self._captured is None:
            return self._train(lr, *batch)
        self._lr.fill_(lr)
        metrics = self._captured(*batch)  # whose tensors the next step overwrites
        kept = {n: v.clone() if isinstance(v, Tensor) else v for n, v in metrics.items()}
        return kept | {"lr": lr}

    def _train(self, lr: float | Tensor, *batch: Tensor) -> StepMetrics:
        loss, metrics = self.loss(self.model, *batch)
        norm = take_step(self.model, self.optimizer, loss, lr, self.recipe.optim)
        return {"loss": loss.detach(), "lr": lr, "grad_norm": norm, **metrics}

    def save(self, path: Path) -> None:
        self._save(path, self.model)
