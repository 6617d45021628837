"""Emu3's vision tokenizer: a code for 8x8 pixels, in video for 4 frames of them.

``B`` batch, ``T`` frames, ``H, W`` pixels; ``t, h, w`` the same of codes; ``D`` code width.
Pixels are in [-1, 1]. Layers and names are those of BAAI/Emu3-VisionTokenizer, so that
``state_dict()`` has the official layout. An image is encoded and decoded once, where the
official code repeats it four times: no code depends on the copies.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from emu3.config import VisionSettings
from emu3.vision.decoder import Decoder
from emu3.vision.encoder import Encoder
from emu3.vision.quantizer import Quantizer
from emu3.vision.temporal import CausalConv
from emu3_kernels.modules import Memory

PIXELS_AT_ONCE = 256 * 256
"""Batch size of the convolutions in inference, in pixels; larger images go one by one."""


class VisionTokenizer(nn.Module):
    compute_dtype: torch.dtype | None = None
    """Dtype of encoder and decoder, on rounded copies of the weights; None keeps the weights'."""
    allow_tf32: bool = False
    """Whether cuDNN may round the operands of float32 convolutions to TF32, here alone: faster, but
    codes may then differ from those of a CPU."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings)
        self.decoder = Decoder(settings)
        self.quantize = Quantizer(settings)
        temporal, width = settings.temporal_factor > 1, settings.code_width
        self.quant_conv = CausalConv(width, (3, 1, 1)) if temporal else None
        self.post_quant_conv = CausalConv(width, (3, 1, 1)) if temporal else None
        self.apply(_initialise)

    @property
    def codebook(self) -> Tensor:
        """``[N, D]``, without gradient."""
        return self.quantize.embedding.weight.detach()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct ``pixels [B, 3, H, W]`` or ``[B, T, 3, H, W]``, differentiably.

        Returns:
            the reconstruction, the codes and the commitment loss. In training batch norms use
            batch statistics, and the codebook may be updated.
        """
        is_image = self.check_pixels(pixels)
        frames = pixels[:, None] if is_image else pixels
        quantized, codes, commitment = self.quantize(self.latents(frames))
        reconstructed = self.pixels(quantized, is_image=is_image)
        return (
            (reconstructed[:, 0], codes[:, 0], commitment)
            if is_image
            else (reconstructed, codes, commitment)
        )

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes ``[B, h, w]`` of images, ``[B, t, h, w]`` of clips ``[B, T, 3, H, W]``.

        A clip of any length is processed four frames at a time.

        Raises:
            ValueError: the latents are not finite; their nearest code would be code 0.
        """
        if self.check_pixels(pixels):
            return self.quantize.codes(_finite(self.latents(pixels[:, None]), "latents"))[:, 0]
        return self.encode_clip(pixels, {})

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels of codes, with the shapes of ``encode``; not clamped to [-1, 1]."""
        if self.check_codes(codes):
            pixels = self.pixels(self.quantize.lookup(codes[:, None]), is_image=True)[:, 0]
            return _finite(pixels, "pixels")
        return self.decode_clip(codes, {})

    @torch.no_grad()
    def encode_clip(self, pixels: Tensor, memory: Memory) -> Tensor:
        """Codes ``[B, t, h, w]`` of the next ``[B, T, 3, H, W]`` of a video, after ``memory``."""
        pieces = pixels.split(self.settings.temporal_factor, dim=1)
        latents = torch.cat([self.latents(piece, memory) for piece in pieces], dim=2)
        return self.quantize.codes(_finite(latents, "latents"))

    @torch.no_grad()
    def decode_clip(self, codes: Tensor, memory: Memory) -> Tensor:
        """Pixels ``[B, T, 3, H, W]`` of the next ``[B, t, h, w]`` of a video, after ``memory``."""
        frames = (self.quantize.lookup(frame) for frame in codes.split(1, dim=1))
        pixels = [self.pixels(frame, is_image=False, memory=memory) for frame in frames]
        return _finite(torch.cat(pixels, dim=1), "pixels")

    def latents(self, frames: Tensor, memory: Memory | None = None) -> Tensor:
        """``[B, D, t, h, w]`` of ``frames [B, T, 3, H, W]``, before quantization.

        One frame is an image, and is repeated.
        """
        frames = frames.to(self.codebook.dtype)
        latents = self._in_batches(self.encoder, frames.flatten(0, 1))
        latents = latents.unflatten(0, frames.shape[:2]).transpose(1, 2)
        if self.quant_conv is None:
            return latents
        if latents.shape[2] == 1:
            latents = latents.expand(-1, -1, self.settings.temporal_factor, -1, -1)
        return self.quant_conv(self.encoder.join(latents, memory), memory)

    def pixels(self, quantized: Tensor, *, is_image: bool, memory: Memory | None = None) -> Tensor:
        """``[B, T, 3, H, W]`` of code vectors ``[B, D, t, h, w]``; T is 1 if ``is_image``."""
        x = quantized
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x, memory)
            x, quantized = self.decoder.part(x, quantized, is_image=is_image, memory=memory)
        flat = (part.transpose(1, 2).flatten(0, 1) for part in (x, quantized))
        images = self._in_batches(self.decoder, *flat)
        return images.unflatten(0, (len(x), -1))

    def _in_batches(self, part: nn.Module, *images: Tensor) -> Tensor:
        """Apply ``part`` to as many images at once as fit the caches, to bound its memory.

        The batch size depends on the image size alone, so a piece of a video gives the same bits
        as the whole.
        """
        images = [p.contiguous(memory_format=torch.channels_last) for p in images]
        if torch.is_grad_enabled():
            return self._rounded(part, *images)
        side = self.settings.spatial_factor if part is self.decoder else 1
        together = PIXELS_AT_ONCE // max(1, side * side * math.prod(images[0].shape[2:]))
        groups = zip(*(p.split(max(1, together)) for p in images), strict=True)
        return torch.cat([self._rounded(part, *group) for group in groups])

    def _rounded(self, part: nn.Module, *images: Tensor) -> Tensor:
        """Apply ``part`` in ``compute_dtype``; the weights keep their dtype."""
        with _float32_convolutions("tf32" if self.allow_tf32 else "ieee"):
            return self._in_compute_dtype(part, *images)

    def _in_compute_dtype(self, part: nn.Module, *images: Tensor) -> Tensor:
        if self.compute_dtype is None:
            return part(*images)
        weights = {name: p.to(self.compute_dtype) for name, p in part.named_parameters()}
        images = tuple(p.to(self.compute_dtype) for p in images)
        return functional_call(part, weights, images).to(self.codebook.dtype)

    def check_pixels(self, pixels: Tensor) -> bool:
        """Check ``pixels``; return whether they are images (not clips)."""
        s = self.settings
        is_image, side = pixels.ndim == 4, s.spatial_factor
        fits = pixels.ndim in (4, 5) and pixels.shape[-3] == 3 and 0 not in pixels.shape
        if not fits or pixels.shape[-2] % side or pixels.shape[-1] % side:
            raise ValueError(
                "VisionTokenizer: pixels must be [B, 3, H, W] or [B, T, 3, H, W], not empty, H and "
                f"W multiples of {side}, got {tuple(pixels.shape)}"
            )
        if not pixels.is_floating_point():
            raise TypeError(f"VisionTokenizer: pixels must be floats, got {pixels.dtype}")
        if not is_image and s.temporal_factor == 1:
            raise ValueError("VisionTokenizer: temporal_factor 1 takes images alone, got a clip")
        if not is_image and pixels.shape[1] % s.temporal_factor:
            raise ValueError(
                f"VisionTokenizer: frames must be a multiple of {s.temporal_factor}, "
                f"got {pixels.shape[1]}"
            )
        return is_image

    def check_codes(self, codes: Tensor) -> bool:
        """Check ``codes``; return whether they are of images (not clips)."""
        s = self.settings
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise TypeError(f"VisionTokenizer: codes must be integers, got {codes.dtype}")
        if codes.ndim not in (3, 4) or 0 in codes.shape:
            raise ValueError(
                "VisionTokenizer: codes must be [B, h, w] or [B, t, h, w], not empty, got "
                f"{tuple(codes.shape)}"
            )
        if codes.ndim == 4 and s.temporal_factor == 1:
            raise ValueError("VisionTokenizer: temporal_factor 1 decodes images alone, got a clip")
        low, high = codes.long().aminmax()
        if low < 0 or high >= s.num_codes:
            raise ValueError(
                f"VisionTokenizer: codes must be in [0, {s.num_codes}), got {low} to {high}"
            )
        return codes.ndim == 3


@contextmanager
def _float32_convolutions(precision: str) -> Iterator[None]:
    """Let cuDNN multiply float32 in ``precision`` inside the block; its own default is TF32.

    Under ``torch.compile``, which cannot trace it, the setting is left as it is.
    """
    if torch.compiler.is_compiling():
        yield
        return
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, precision
    try:
        yield
    finally:
        conv.fp32_precision = before


def _finite(values: Tensor, name: str) -> Tensor:
    if not values.isfinite().all():
        raise ValueError(f"VisionTokenizer: {name} must be finite, got NaN or infinity")
    return values


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Initialise as the official code does; weights of 2-D convolutions are channels-last."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.Conv2d):
        module.to(memory_format=torch.channels_last)
