"""The definition of sample_guided in plain PyTorch."""

import torch
from torch import Tensor

from emu3_kernels.runtime.dropout import philox


def sample_guided(
    cond: Tensor,
    uncond: Tensor | None,
    seeds: Tensor,
    places: Tensor,
    *,
    guidance: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    num: int = 1,
) -> Tensor:
    logits = guided(cond, uncond, guidance)
    kept, ids = logits.sort(dim=-1, descending=True, stable=True)
    kept, ids = kept[..., :top_k], ids[..., :top_k]
    below = (kept - kept[..., :1]) / temperature
    num_codes = cond.shape[-1]
    if top_p is not None and top_p < 1:
        ids = ids.where(_mass_before(below) < torch.tensor(top_p, dtype=torch.float32), num_codes)
    ids, order = ids.sort(dim=-1)  # dropped ones come last
    noise = gumbel(seeds.view(-1, *[1] * (cond.dim() - 1)), places[..., None], ids, below.dtype)
    scores = (below.gather(-1, order) + noise).masked_fill(ids == num_codes, -torch.inf)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :num]
    codes = ids.gather(-1, best)
    codes = torch.nn.functional.pad(codes, (0, num - codes.shape[-1]), value=num_codes)
    dead = (places < 0) | logits.isnan().any(-1)
    return codes.masked_fill((codes == num_codes) | dead[..., None], -1)


def guided(cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """``uncond + guidance * (cond - uncond)``, clamped to the finite range."""
    compute = torch.promote_types(cond.dtype, torch.float32)
    logits = cond.to(compute)
    if uncond is not None:
        logits = uncond.to(compute) + guidance * (logits - uncond.to(compute))
    largest = torch.finfo(torch.float32).max
    return logits.clamp(-largest, largest)


def _mass_before(below: Tensor) -> Tensor:
    """Return the softmax mass of the larger logits, a float32."""
    weights = below.exp().double()
    before = weights.cumsum(-1) - weights
    return (before / weights.sum(-1, keepdim=True)).float()


def gumbel(seeds: Tensor, places: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the noise of the codes ``ids``; the arguments broadcast."""
    words = philox(seeds, ids >> 2, places, torch.zeros_like(ids), torch.ones_like(ids))
    first, second = (torch.where(ids % 4 == i, words[i], words[i + 2]) for i in (0, 1))
    return gumbel_of(torch.where(ids % 2 == 0, first, second), dtype)


def gumbel_of(word: Tensor, dtype: torch.dtype) -> Tensor:
    """``-log(-log1p(-(word + 1/2) / 2**32))``: small exponentials keep their relative precision.

    A word that rounds to 1 gives -infinity, never +infinity.
    """
    uniform = (word.to(dtype) + 0.5) * 2.0**-32
    return -(-torch.log1p(-uniform)).log()
