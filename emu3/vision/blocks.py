"""Blocks of encoder and decoder, on single images ``x [B, C, H, W]`` in channels-last.

The encoder normalises by groups; the decoder's norm is scaled and shifted, position by
position, by the ``latent [B, D, h, w]``; the encoder's blocks take none. Names are those of the
official weights.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3_kernels import attention
from emu3_kernels.modules import Conv3x3
from emu3_kernels.modules.prepared import Prepared

MakeNorm = Callable[..., nn.Module]
"""Called with the number of channels and the norm's ``silu``."""


class ResBlock(nn.Module):
    """Two 3x3 convolutions behind norms, added to their input."""

    def __init__(self, narrow: int, wide: int, norm: MakeNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(narrow), norm(wide)
        self.conv1, self.conv2 = Conv3x3(narrow, wide), Conv3x3(wide, wide)
        self.nin_shortcut = nn.Conv2d(narrow, wide, 1) if narrow != wide else None

    def forward(self, x: Tensor, *latent: Tensor) -> Tensor:
        change = self.norm2(self.conv1(self.norm1(x, *latent)), *latent)
        return self.conv2(change, x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """One head, its dim the number of channels, over all positions; added to its input.

    No flash kernel takes a head of 512 or 1024: inference in 16 bits on a GPU multiplies matrices,
    with scores in float32.
    """

    linear = staticmethod(F.linear)

    def __init__(self, channels: int, norm: MakeNorm) -> None:
        super().__init__()
        self.norm = norm(channels, silu=False)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, *latent: Tensor) -> Tensor:
        positions = self.norm(x, *latent).permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = (self._per_position(conv, positions) for conv in (self.q, self.k, self.v))
        if _can_hold_scores(q):
            attended = _attend_by_gemms(q, k, v)
        else:
            heads = (part.unsqueeze(2) for part in (q, k, v))
            attended = attention(*heads, causal=False).squeeze(2)
        out = self._per_position(self.proj_out, attended)
        return out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2).add_(x)

    def _per_position(self, conv: nn.Conv2d, positions: Tensor) -> Tensor:
        """Apply a 1x1 convolution to ``positions [B, H * W, C]``."""
        return self.linear(positions, conv.weight.flatten(1), conv.bias)


MOST_SCORES = 1 << 28
"""1 GiB in float32: an image of 1024 x 1024."""


def _can_hold_scores(q: Tensor) -> bool:
    batch, positions, _ = q.shape
    in_16_bits = q.dtype in (torch.bfloat16, torch.float16)
    wanted = q.is_cuda and in_16_bits and not torch.is_grad_enabled()
    return wanted and batch * positions * positions <= MOST_SCORES


def _attend_by_gemms(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in ``[B, positions, C]``; scores and their softmax are float32."""
    scores = _scores(q, k).mul_(q.shape[-1] ** -0.5)
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(q, k.mT, out_dtype=torch.float32)


class Stage(nn.Module):
    """The residual blocks of one resolution, and its attention, one after each block."""

    def __init__(
        self, narrow: int, wide: int, norm: MakeNorm, *, num_blocks: int, attend: bool
    ) -> None:
        super().__init__()
        inputs = [narrow, *[wide] * (num_blocks - 1)]
        self.block = nn.ModuleList(ResBlock(channels, wide, norm) for channels in inputs)
        self.attn = nn.ModuleList(Attention(wide, norm) for _ in inputs if attend)

    def forward(self, x: Tensor, *latent: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x, *latent)
            if self.attn:
                x = self.attn[number](x, *latent)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, norm: MakeNorm) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, norm)
        self.attn_1 = Attention(channels, norm)
        self.block_2 = ResBlock(channels, channels, norm)

    def forward(self, x: Tensor, *latent: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, *latent), *latent), *latent)


class Downsample(nn.Module):
    """Halve both sides; padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution, with 4/9 of the multiplications.

    Weights that apply to the same input pixel are summed first, in inference once: a transposed 4x4
    convolution of stride 2.
    """

    conv_transpose2d = staticmethod(F.conv_transpose2d)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self._summed = Prepared(_summed)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._summed(self.conv.weight)
        return self.conv_transpose2d(x, weight, self.conv.bias, stride=2, padding=1)


def _summed(weight: Tensor) -> Tensor:
    """``[out, in, 3, 3]`` to the ``[in, out, 4, 4]`` of the transposed convolution."""
    taps = weight.permute(1, 2, 3, 0).contiguous()  # [in, 3, 3, out]
    return _pair_sums(_pair_sums(taps, dim=1), dim=2).permute(0, 3, 1, 2)


def _pair_sums(weight: Tensor, dim: int) -> Tensor:
    """Three taps to four, last first: sums of the taps that apply to the same input pixel."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((last, middle + last, first + middle, first), dim)
