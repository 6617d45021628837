"""Steps that would damage the weights are skipped."""

import torch
from torch import Tensor

from emu3.train.store_recipe import GuardSettings


class Guard:
    """Decides on the device which steps are skipped, so that the host need not wait for it.

    A step is skipped if its loss or its gradient norm is not finite, or if the norm is a spike: a
    multiple of the running mean of those that were not. All ranks decide the same, from the same
    numbers.
    """

    def __init__(self, settings: GuardSettings, device: torch.device) -> None:
        self.settings = settings
        self._mean = torch.zeros((), dtype=torch.float64, device=device)
        self._taken, self._skipped, self._in_a_row = torch.zeros(
            3, dtype=torch.int64, device=device
        ).unbind()

    def skips(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Count a step; return whether it is skipped, 0-d float32, 0 or 1."""
        s = self.settings
        good = torch.isfinite(loss) & torch.isfinite(norm)
        if s.spike is not None:
            good &= (norm <= s.spike * self._mean) | (self._taken < s.warmup_steps)
        self._taken += good
        self._skipped += ~good
        self._in_a_row.copy_(torch.where(good, 0, self._in_a_row + 1))
        share = (1 / self._taken.double()).clamp(min=1 - s.decay)
        self._mean.copy_(
            torch.where(good, torch.lerp(self._mean, norm.double(), share), self._mean)
        )
        return (~good).float()

    def metrics(self) -> dict[str, Tensor]:
        """Return the number of skipped steps of the run, and of those at its end."""
        return {"skipped": self._skipped.clone(), "in_a_row": self._in_a_row.clone()}

    def state(self) -> dict[str, float]:
        return {name: value.item() for name, value in self._values().items()}

    def restore(self, state: dict[str, float]) -> None:
        for name, value in self._values().items():
            value.fill_(state[name])

    def _values(self) -> dict[str, Tensor]:
        return {
            "mean": self._mean,
            "taken": self._taken,
            "skipped": self._skipped,
            "in_a_row": self._in_a_row,
        }
