"""What each stage minimises: a loss to differentiate, and figures to log."""

import torch.nn.functional as F
from torch import Tensor

from emu3.model import Emu3
from emu3.vision import VisionTokenizer


def next_token(
    model: Emu3, tokens: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Weighted next-token loss of ``tokens [B, T]``."""
    return model.loss(tokens, weights), {"tokens": tokens.numel()}


def reconstruction(
    model: VisionTokenizer, pictures: Tensor
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Squared error of the reconstruction plus the weighted commitment of the latents."""
    redrawn, codes, commitment = model(pictures)
    error = F.mse_loss(redrawn, pictures)
    figures = {"error": error.detach(), "codes": codes.unique().numel()}
    return error + model.settings.commitment * commitment, figures
