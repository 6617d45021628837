"""Log-probabilities of images under the reference model, for preference pairs."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from emu3.data.pairs import Pairs
from emu3.generate.common import pad_right
from emu3.model import Emu3
from emu3_kernels import linear_cross_entropy


@torch.no_grad()
def reference_of(model: Emu3, pairs: Pairs, *, tokens: int = 16384) -> Tensor:
    """Return the log-probabilities ``[n, 2]`` of the chosen and the rejected images, in nats.

    Sums over visual tokens, given the prompt, float64 sums of numbers in the model's dtype. No
    logits are kept.

    Args:
        model: in eval mode.
        pairs: with the vocabulary of the model.
        tokens: that run together, about.
    """
    if model.training:
        raise ValueError("reference: the model must be in eval mode, call model.eval() first")
    documents = [ids for number in range(len(pairs)) for ids in pairs.documents(number)]
    size = max(1, tokens // max(map(len, documents), default=1))
    found = [_log_probabilities(model, part) for part in _parts(documents, size)]
    return torch.cat([torch.empty(0, dtype=torch.float64), *found]).view(-1, 2)


def _parts(documents: Sequence[list[int]], size: int) -> Iterator[Sequence[list[int]]]:
    return (documents[at : at + size] for at in range(0, len(documents), size))


def _log_probabilities(model: Emu3, documents: Sequence[list[int]]) -> Tensor:
    ids = model.settings.vocabulary
    tokens = pad_right(documents, ids.pad)[0].to(model.embedding.weight.device)
    targets = tokens[:, 1:]
    weights = (targets >= ids.visual_start).float()
    given = model(tokens[:, :-1]), model.head.weight, targets
    losses = linear_cross_entropy(*given, weights=weights, reduction="none")
    return -losses.double().sum(1).cpu()
