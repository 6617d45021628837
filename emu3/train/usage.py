"""How much of a codebook is in use."""

import torch
from torch import Tensor, nn

WINDOW = 100
"""Steps over which usage is measured."""


class CodeUsage(nn.Module):
    """Usage and perplexity of N codes over the last steps."""

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.register_buffer("age", torch.full((num_codes,), WINDOW))
        self.register_buffer("frequency", torch.zeros(num_codes, dtype=torch.float64))

    def update(self, codes: Tensor) -> dict[str, float]:
        """Update with the codes of a step.

        Returns:
            ``usage``, the share of codes used in the last ``WINDOW`` steps, and ``perplexity``,
            ``exp(-sum p log p)`` of their running frequencies ``p``: N if all come equally often.
        """
        counts = torch.bincount(codes.flatten(), minlength=len(self.age))
        self.age.add_(1)[counts > 0] = 0
        self.frequency.mul_(1 - 1 / WINDOW).add_(counts)
        return {
            "usage": float((self.age < WINDOW).double().mean()),
            "perplexity": perplexity(self.frequency),
        }


def perplexity(counts: Tensor) -> float:
    """``exp(-sum p log p)`` of the shares ``p`` of ``counts``, in float64."""
    share = counts.double() / counts.sum()
    return float(torch.special.entr(share).sum().exp())
