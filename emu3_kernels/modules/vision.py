"""The ops of a vision tokenizer as modules.

B batch, C channels, O channels out, T frames, H rows, W columns; L channels of the latent; N codes,
D code width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3_kernels.modules.prepared import Prepared
from emu3_kernels.ops.conv2d.api import conv3x3
from emu3_kernels.ops.conv3d.api import causal_conv3d, temporal_residual
from emu3_kernels.ops.conv3d.cache import FrameCache
from emu3_kernels.ops.group_norm.api import group_norm_silu, spatial_norm_silu
from emu3_kernels.ops.vq.api import nearest_code

Memory = dict[nn.Module, FrameCache]
"""Past frames by convolution, for a video in pieces; an empty one begins a video."""


class GroupNormSiLU(nn.GroupNorm):
    """:func:`emu3_kernels.group_norm_silu` with the parameters of ``nn.GroupNorm``.

    Args:
        num_groups: divides C.
        num_channels: C.
        eps: added to the variance; 1e-6 in Emu3.
        silu: False leaves the normalised x, scaled and shifted.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-6,
        *,
        silu: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, device=device, dtype=dtype)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x [B, C, H, W]`` or ``[B, C, T, H, W]``."""
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, self.silu)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, silu={self.silu}"


class SpatialNormSiLU(nn.Module):
    """:func:`emu3_kernels.spatial_norm_silu` with its parameters, under Emu3's own names.

    ``norm_layer`` holds those of ``nn.GroupNorm``, ``conv_y`` and ``conv_b`` those of
    ``nn.Conv2d(L, C, 1)``; all three begin as these do.

    Args:
        num_groups: divides C.
        num_channels: C.
        latent_width: L; 4 in Emu3.
        eps: added to the variance; 1e-6 in Emu3.
        silu: False leaves the modulated x.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        latent_width: int,
        eps: float = 1e-6,
        *,
        silu: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.silu = silu
        self.norm_layer = nn.GroupNorm(num_groups, num_channels, eps, **where)
        self.conv_y = nn.Conv2d(latent_width, num_channels, 1, **where)
        self.conv_b = nn.Conv2d(latent_width, num_channels, 1, **where)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """Normalise ``x [B, C, H, W]`` and modulate it by ``latent [B, L, h, w]``, or videos."""
        norm, y, b = self.norm_layer, self.conv_y, self.conv_b
        return spatial_norm_silu(
            x,
            latent,
            norm.weight,
            norm.bias,
            y.weight.flatten(1),
            y.bias,
            b.weight.flatten(1),
            b.bias,
            groups=norm.num_groups,
            eps=norm.eps,
            silu=self.silu,
        )

    def extra_repr(self) -> str:
        return f"silu={self.silu}"


class Conv3x3(nn.Conv2d):
    """:func:`emu3_kernels.conv3x3` with the parameters of ``nn.Conv2d(C, O, 3, padding=1)``.

    Args:
        in_channels: C.
        out_channels: O.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve ``x [B, C, H, W]`` and add ``residual [B, O, H, W]``."""
        return conv3x3(x, self.weight, self.bias, residual)


class CausalConv3d(nn.Conv3d):
    """:func:`emu3_kernels.causal_conv3d` with the parameters of ``nn.Conv3d``.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: of time, rows and columns, or of all three.
        stride: likewise, each from 1 to the size of the kernel.
        bias: whether there is one.
        activation: ``"silu"`` before the convolution, or None.
        post_activation: ``"silu"`` after the bias, or None.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        *,
        bias: bool = True,
        activation: str | None = None,
        post_activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=bias, **where)
        self.activations = {"activation": activation, "post_activation": post_activation}

    def forward(
        self,
        x: Tensor,
        memory: Memory | None = None,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Convolve ``x [B, C, T, H, W]``; scale, shift and residual as in the op.

        With a ``memory``, ``x`` is the next piece of a video: the past frames in its window
        are read from the memory, and its own last frames are saved there.
        """
        settings = {"stride": self.stride, **self.activations}
        settings |= {"scale": scale, "shift": shift, "residual": residual}
        if memory is None:
            return causal_conv3d(x, self.weight, self.bias, **settings)
        cache = memory.get(self, FrameCache())
        y, memory[self] = causal_conv3d(x, self.weight, self.bias, cache=cache, **settings)
        return y

    def extra_repr(self) -> str:
        activations = (f"{name}={value!r}" for name, value in self.activations.items() if value)
        return ", ".join((super().extra_repr(), *activations))


class TemporalResidual(nn.Module):
    """:func:`emu3_kernels.temporal_residual` with its batch norms and convolutions.

    Names and initial values are those of Emu3's block (``Emu3VisionVQResnetTemporalBlock``):
    ``norm1`` and ``norm2`` as ``nn.BatchNorm3d(C)``, ``conv1.conv`` and ``conv2.conv`` as
    ``nn.Conv3d(C, C, 3)``. In training the norms take the statistics of the batch, and the block
    is two calls of :func:`emu3_kernels.causal_conv3d`, as it is with a memory.

    Args:
        channels: C; 4 in Emu3.
        device: of parameters and running statistics.
        dtype: of both.
    """

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.norm1, self.norm2 = (_FoldedBatchNorm(channels, **where) for _ in range(2))
        self.conv1, self.conv2 = (
            nn.ModuleDict({"conv": CausalConv3d(channels, channels, 3, activation="silu", **where)})
            for _ in range(2)
        )

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Add both convolutions to ``x [B, C, T, H, W]``; memory as in :class:`CausalConv3d`."""
        first, second = self.conv1.conv, self.conv2.conv
        if not self.training and memory is None:
            # Running statistics do not depend on the input of a norm.
            of_first = (*self.norm1(x), first.weight, first.bias)
            return temporal_residual(x, *of_first, *self.norm2(x), second.weight, second.bias)
        scale, shift = self.norm1(x)
        hidden = first(x, memory, scale=scale, shift=shift)
        scale, shift = self.norm2(hidden)
        return second(hidden, memory, scale=scale, shift=shift, residual=x)


class _FoldedBatchNorm(nn.BatchNorm3d):
    """A batch norm folded into the next convolution, as a scale and a shift by channel."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._folded = Prepared(_fold)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``scale, shift [C]`` in float32, of the batch in training."""
        compute = torch.promote_types(x.dtype, torch.float32)
        settings = {"eps": self.eps, "compute": compute}
        if self.training:
            mean, variance = self._of_batch(x.to(compute))
            return _fold(self.weight, self.bias, mean, variance, **settings)
        running = self.running_mean, self.running_var
        return self._folded(self.weight, self.bias, *running, **settings)

    def _of_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, (0, 2, 3, 4), correction=0)
        count = x.numel() / x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = variance * (count / max(count - 1, 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, variance


def _fold(
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    eps: float,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    scale = weight.to(compute) * torch.rsqrt(variance.to(compute) + eps)
    return scale, bias.to(compute) - mean.to(compute) * scale


class VectorQuantizer(nn.Module):
    """The nearest code of every latent, with a codebook ``weight [N, D]``, as ``nn.Embedding``.

    Codes come from :func:`emu3_kernels.nearest_code`. Gradients pass the rounding unchanged to the
    latents (straight through); the codebook gets them from :meth:`lookup` alone.

    Args:
        num_codes: N.
        width: D, at most 32.
        device: of the codebook.
        dtype: of the codebook.
    """

    def __init__(
        self,
        num_codes: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        weight = torch.empty(num_codes, width, device=device, dtype=dtype)
        self.weight = nn.Parameter(nn.init.uniform_(weight, -1 / num_codes, 1 / num_codes))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Round ``z [B, D, ...]``: the codes' vectors in its shape, and the codes ``[B, ...]``."""
        codes = nearest_code(z, self.weight)
        rounded = self.lookup(codes).detach().to(z.dtype)
        return z + (rounded - z).detach(), codes

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors ``[B, D, ...]`` of ``codes [B, ...]``."""
        return F.embedding(codes, self.weight).movedim(-1, 1)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)
