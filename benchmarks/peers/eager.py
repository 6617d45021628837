"""Our ops as a user writes them in plain PyTorch: timed eager and compiled."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return F.rms_norm(summed, weight.shape, weight, 1e-5), summed


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: None) -> tuple[Tensor, Tensor]:
    """Rotate as Hugging Face's Llama does: tables in the dtype of q, halves swapped by a copy."""
    cos, sin = (
        table[: q.shape[1]].to(q.dtype).repeat(1, 2)[None, :, None, :] for table in (cos, sin)
    )
    return q * cos + _swap_halves(q) * sin, k * cos + _swap_halves(k) * sin


def _swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Convert the logits to float32 and average, as Hugging Face's models do."""
    if weights is None:
        return F.cross_entropy(logits.float(), targets)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum() / weights.where(targets != -100, 0).sum()


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    return cross_entropy(F.linear(hidden, head), targets, weights)


def sample_guided(
    cond: Tensor,
    uncond: Tensor,
    seeds: Tensor,
    places: Tensor,
    guidance: float,
    top_k: int,
    top_p: None,
    temperature: float,
    num: int,
) -> Tensor:
    """Draw from PyTorch's generator, which ``seeds`` and ``places`` do not set."""
    best, ids = torch.lerp(uncond, cond, guidance).topk(top_k)
    probs = (best / temperature).softmax(-1)
    drawn = torch.multinomial(probs.flatten(0, -2), num)
    return ids.gather(-1, drawn.view(*places.shape, num))


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    post_activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Call norm, SiLU, padding and convolution one by one, as Hugging Face's Emu3 does."""
    if scale is not None:
        identity = torch.zeros_like(scale), torch.ones_like(scale)
        x = F.batch_norm(x, *identity, scale, shift, eps=0)
    if activation:
        x = F.silu(x)
    height, width = (k - s for k, s in zip(weight.shape[3:], stride[1:], strict=True))
    space = (width // 2 + width % 2, width // 2, height // 2 + height % 2, height // 2)
    y = F.conv3d(F.pad(x, (*space, weight.shape[2] - stride[0], 0)), weight, bias, stride)
    y = F.silu(y) if post_activation else y
    return y if residual is None else y + residual


def temporal_residual(
    x: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    first, second = {"scale": scale1, "shift": shift1}, {"scale": scale2, "shift": shift2}
    hidden = causal_conv3d(x, weight1, bias1, activation="silu", **first)
    return causal_conv3d(hidden, weight2, bias2, activation="silu", residual=x, **second)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    page_table: None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend to full rows, as in every timed case; one new token needs no mask."""
    heads = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    settings = {"scale": scale, "enable_gqa": True}
    if mask is not None:
        (batch, num_new), num_keys = mask.shape, k_cache.shape[1]
        bits = mask[..., None] >> torch.arange(num_new, device=q.device) & 1 != 0
        attended = bits.new_ones(batch, 1, num_new, num_keys)
        attended[:, 0, :, num_keys - num_new :] = bits
        settings["attn_mask"] = attended
    return F.scaled_dot_product_attention(*heads, **settings).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **rest: object) -> Tensor:
    """Attend to one document without dropout, as in every timed case; T = S."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, 1e-6))


def spatial_norm_silu(
    x: Tensor,
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    y_weight: Tensor,
    y_bias: Tensor,
    b_weight: Tensor,
    b_bias: Tensor,
    groups: int,
) -> Tensor:
    """Normalise images as Emu3's own SpatialNorm does, then apply its swish."""
    resized = F.interpolate(latent, size=x.shape[-2:], mode="nearest")
    normed = F.group_norm(x, groups, weight, bias, 1e-6)
    y = F.conv2d(resized, y_weight[:, :, None, None], y_bias)
    modulated = normed * y + F.conv2d(resized, b_weight[:, :, None, None], b_bias)
    return modulated * torch.sigmoid(modulated)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    y = F.conv2d(x, weight, bias, padding=1)
    return y if residual is None else y + residual
