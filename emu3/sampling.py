"""From logits to tokens: pure functions on ``[B, N]`` logits of the ids that may come next.

The grammar needs no mask here: the decode loop computes only the rows of the head that it allows,
which gives the same distribution as masking the others.
"""

import math

import torch
from torch import Tensor


def apply_cfg(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance on raw logits: ``uncond + guidance * (cond - uncond)``.

    Overflow saturates at the largest number of the dtype.
    """
    if not 0 <= guidance < math.inf:
        raise ValueError(f"apply_cfg: guidance must be finite and not negative, got {guidance}")
    largest = torch.finfo(cond.dtype).max
    return torch.lerp(uncond, cond, guidance).clamp(-largest, largest)


def top_k_logits(logits: Tensor, top_k: int | None) -> Tensor:
    """Set every logit outside the ``top_k`` largest of its row to ``-inf``; None keeps all."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"sampling: top_k must be at least 1, got {top_k}")
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    best, where = logits.topk(top_k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, where, best)


def sample(
    logits: Tensor, *, top_k: int | None, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """One index per row ``[B]`` int64, sampled from the softmax of the ``top_k`` logits.

    With ``top_k=1`` it is the argmax, the first of equals; no random number is consumed. As
    ``torch.multinomial`` draws, but without its checks, for which the host waits on a GPU: of
    logits whose largest is not finite the result is arbitrary.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"sample: temperature must be positive and finite, got {temperature}")
    if top_k == 1:
        return logits.argmax(-1)
    kept = top_k_logits(logits.float(), top_k)
    # The largest is 0 and stays 0; the others may overflow to -inf. 1 / tiny does not overflow.
    below = (kept - kept.amax(-1, keepdim=True)) / max(temperature, torch.finfo(kept.dtype).tiny)
    probs = torch.softmax(below, dim=-1)
    waits = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / waits).argmax(-1)
