"""The released vision tokenizer, transcribed layer by layer over its official state dict.

From emu3/tokenizer/modeling_emu3visionvq.py of baaivision/Emu3: an image is repeated four times,
every frame is encoded and decoded, and nothing is folded or skipped. Hugging Face's class is
another oracle for images; its video path cuts frames where it should cut rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
ATTENDED = 3
STAGES, BLOCKS, FRAMES = 4, 2, 4


def latents(w: Weights, pixels: Tensor) -> Tensor:
    """``[b, 4, t/4, h, w]`` of ``[b, t, 3, H, W]``."""
    b, t = pixels.shape[:2]
    x = _conv(w, "encoder.conv_in", pixels.flatten(0, 1))
    for stage in range(STAGES):
        for block in range(BLOCKS):
            x = _block(w, f"encoder.down.{stage}.block.{block}", x)
            if stage == ATTENDED:
                x = _attention(w, f"encoder.down.{stage}.attn.{block}", x)
        if stage < STAGES - 1:
            name = f"encoder.down.{stage}.downsample.conv"
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
    x = _block(w, "encoder.mid.block_1", x)
    x = _attention(w, "encoder.mid.attn_1", x)
    x = _block(w, "encoder.mid.block_2", x)
    x = _conv(w, "encoder.conv_out", _swish(_norm(w, "encoder.norm_out", x)))
    x = x.view(b, t, *x.shape[1:]).permute(0, 2, 1, 3, 4)
    for number in range(2):
        x = _swish(_causal(w, f"encoder.time_conv.{number}.conv.conv", x, stride=2))
    for number in range(BLOCKS):
        x = _temporal_block(w, f"encoder.time_res_stack.{number}", x)
    return _causal(w, "quant_conv.conv", x)


def encode(w: Weights, pixels: Tensor) -> Tensor:
    """Codes ``[b, t/4, h, w]`` of ``[b, t, 3, H, W]``."""
    x = latents(w, pixels)
    rows, codebook = x.permute(0, 2, 3, 4, 1), w["quantize.embedding.weight"]
    distance = rows.square().sum(-1, keepdim=True) + codebook.square().sum(1)
    return (distance - 2 * rows @ codebook.T).argmin(-1)


def decode(w: Weights, codes: Tensor) -> Tensor:
    """Pixels ``[b, 4 t, 3, H, W]`` of ``[b, t, h, w]``."""
    vectors = w["quantize.embedding.weight"][codes].permute(0, 4, 1, 2, 3)
    x = torch.cat((_causal(w, "post_quant_conv.conv", vectors), vectors))
    for number in range(BLOCKS):
        x = _temporal_block(w, f"decoder.time_res_stack.{number}", x)
    for number in range(2):
        doubled = x.repeat_interleave(2, dim=2)
        x = _swish(_causal(w, f"decoder.time_conv.{number}.conv.conv", doubled))
    x, latent = (part.permute(0, 2, 1, 3, 4).flatten(0, 1) for part in x.chunk(2))
    x = _conv(w, "decoder.conv_in", x)
    x = _block(w, "decoder.mid.block_1", x, latent)
    x = _attention(w, "decoder.mid.attn_1", x, latent)
    x = _block(w, "decoder.mid.block_2", x, latent)
    for stage in reversed(range(STAGES)):
        for block in range(BLOCKS + 1):
            x = _block(w, f"decoder.up.{stage}.block.{block}", x, latent)
            if stage == ATTENDED:
                x = _attention(w, f"decoder.up.{stage}.attn.{block}", x, latent)
        if stage > 0:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = _conv(w, f"decoder.up.{stage}.upsample.conv", x)
    x = _conv(w, "decoder.conv_out", _swish(_norm(w, "decoder.norm_out", x, latent)))
    return x.view(len(codes), -1, *x.shape[1:])


def _conv(w: Weights, name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _norm(w: Weights, name: str, x: Tensor, latent: Tensor | None = None) -> Tensor:
    if latent is None:
        return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    inner = f"{name}.norm_layer"
    x = F.group_norm(x, 32, w[f"{inner}.weight"], w[f"{inner}.bias"], 1e-6)
    latent = F.interpolate(latent, size=x.shape[-2:], mode="nearest")
    return x * _conv(w, f"{name}.conv_y", latent) + _conv(w, f"{name}.conv_b", latent)


def _block(w: Weights, name: str, x: Tensor, latent: Tensor | None = None) -> Tensor:
    change = _conv(w, f"{name}.conv1", _swish(_norm(w, f"{name}.norm1", x, latent)))
    change = _conv(w, f"{name}.conv2", _swish(_norm(w, f"{name}.norm2", change, latent)))
    shortcut = f"{name}.nin_shortcut"
    return change + (_conv(w, shortcut, x) if f"{shortcut}.weight" in w else x)


def _attention(w: Weights, name: str, x: Tensor, latent: Tensor | None = None) -> Tensor:
    normed = _norm(w, f"{name}.norm", x, latent)
    q, k, v = (_conv(w, f"{name}.{part}", normed).flatten(2) for part in "qkv")
    scores = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)
    out = (v @ scores.transpose(1, 2)).view(x.shape)
    return x + _conv(w, f"{name}.proj_out", out)


def _causal(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = w[f"{name}.weight"]
    side = weight.shape[-1] // 2
    x = F.pad(x, (side, side, side, side, 2, 0))
    return F.conv3d(x, weight, w[f"{name}.bias"], stride=(stride, 1, 1))


def _temporal_block(w: Weights, name: str, x: Tensor) -> Tensor:
    change = x
    for number in (1, 2):
        norm = [w[f"{name}.norm{number}.{part}"] for part in ("running_mean", "running_var")]
        norm += [w[f"{name}.norm{number}.{part}"] for part in ("weight", "bias")]
        change = _swish(F.batch_norm(change, *norm, eps=1e-5))
        change = _causal(w, f"{name}.conv{number}.conv", change)
    return x + change
