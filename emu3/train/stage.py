"""What the loop drives: modules that learn, a stream to learn from, and one step."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from emu3.config import Recipe
from emu3.train.optim import build_optimizer, learning_rate, take_step

Figures = dict[str, Tensor | float]


class Stream(Protocol):
    """Endless batches whose place can be saved and found again."""

    def next_batch(self) -> tuple[Tensor, ...]: ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor]) -> None: ...


class Stage(Protocol):
    """A kind of training. ``modules``, ``optimizers`` and ``stream`` are its whole state."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    stream: Stream

    def step(self, step: int, *batch: Tensor) -> Figures:
        """Learn from a batch; return what to log, ``loss`` among it."""
        ...

    def save(self, path: Path) -> None:
        """Write the trained weights."""
        ...


class SingleLossStage:
    """One model that descends on one loss."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        stream: Stream,
        loss: Callable[..., tuple[Tensor, Figures]],
        save: Callable[[Path, nn.Module], None],
    ) -> None:
        self.recipe, self.model, self.stream, self.loss = recipe, model, stream, loss
        self.optimizer = build_optimizer(model, recipe.optim)
        self.modules, self.optimizers = {"model": model}, {"optimizer": self.optimizer}
        self._save = save

    def step(self, step: int, *batch: Tensor) -> Figures:
        loss, figures = self.loss(self.model, *batch)
        lr = learning_rate(step, self.recipe.train.steps, self.recipe.optim)
        norm = take_step(self.model, self.optimizer, loss, lr, self.recipe.optim)
        return {"loss": loss.detach(), "lr": lr, "grad_norm": norm, **figures}

    def save(self, path: Path) -> None:
        self._save(path, self.model)
