"""The loss of each stage, and metrics to log."""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.model import Emu3
from emu3.vision import VisionTokenizer


def next_token(
    model: Emu3, tokens: Tensor, weights: Tensor, document_ids: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Weighted next-token loss of ``tokens [B, T]``, of packed rows within each document."""
    return model.loss(tokens, weights, document_ids), {"tokens": tokens.numel()}


def next_token_of_all(
    model: Emu3, tokens: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """:func:`next_token` with GEMMs of all tokens, also of weight 0: for a CUDA graph."""
    keep = torch.arange(weights[:, 1:].numel(), device=weights.device)
    return model.loss(tokens, weights, keep=keep), {"tokens": tokens.numel()}


def reconstruction(
    model: VisionTokenizer, images: Tensor
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Squared error of the reconstruction plus the weighted commitment of the latents."""
    reconstructed, codes, commitment = model(images)
    error = F.mse_loss(reconstructed, images)
    metrics = {"error": error.detach(), "codes": codes.unique().numel()}
    return error + model.settings.commitment * commitment, metrics
