"""Starting weights of a vision tokenizer: random, Emu3's own, or MoVQGAN's.

MoVQGAN (Emu3's tokenizer for images, under the same names) has no temporal layers. New ones start
as the mean over frames in the encoder and as copies in the decoder, so that a constant clip is
reconstructed as its image.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from emu3.config import Recipe
from emu3.vision import VisionTokenizer
from emu3.vision.blocks import Attention, ResBlock
from emu3.vision.decoder import Decoder
from emu3.vision.encoder import Encoder
from emu3.vision.quantizer import RUNNING_MEANS
from emu3.weights import fill, load_vision, read_tensors
from emu3_kernels.modules import SpatialNormSiLU

# Arguments at which SiLU is nearly linear: for colours, and for latents of any size.
_LIFT, LIFT = 2.0, 6.0
_CONSTANT = 2.0
_SMALLEST_GROUP = 4
"""Fewest channels of a group norm's group: three colours and a constant."""
_CODES = "quantize.embedding.weight"


def begin(recipe: Recipe) -> VisionTokenizer:
    """The tokenizer of ``recipe.vision`` with the weights of ``recipe.objective.start``.

    Raises:
        ValueError: one line, if the weights are of another shape than ``recipe.vision``.
    """
    tokenizer, start = VisionTokenizer(recipe.vision), recipe.objective.start
    if start is None:
        _initialise(tokenizer)
        pass_through(tokenizer, lift=_LIFT)
        return tokenizer
    found = read_tensors(start)[0] if start.is_file() else {}
    if "quant_conv.weight" in found:
        _fill(tokenizer, _of_images(tokenizer, found), start)
        pass_through(tokenizer, found, lift=LIFT)
    else:
        _fill(tokenizer, load_vision(start).state_dict(), start)
    return tokenizer


@torch.no_grad()
def pass_through(
    tokenizer: VisionTokenizer, mixing: Mapping[str, Tensor] | None = None, *, lift: float = 0.0
) -> None:
    """Initialise the temporal layers as the mean of four frames, and its repetition.

    Args:
        mixing: the 1x1 convolutions ``quant_conv`` and ``post_quant_conv`` before and after the
            codes; None for identities.
        lift: SiLU's argument at which the latents pass: far above 0 it is linear.
    """
    if tokenizer.quant_conv is None:
        return
    for part, frames in ((tokenizer.encoder, 2), (tokenizer.decoder, 1)):
        for number, layer in enumerate(part.time_conv):
            _let_through(layer.conv.conv, frames, lift, first=number == 0)
        for block in part.time_res_stack:
            nn.init.zeros_(block.conv2.conv.weight)
            nn.init.zeros_(block.conv2.conv.bias)
    level = _silu_at(lift)[0]
    _mix(tokenizer.quant_conv.conv, mixing, "quant_conv", level)
    _mix(tokenizer.post_quant_conv.conv, mixing, "post_quant_conv", 0.0)
    _subtract(tokenizer.decoder.conv_in, level)
    for module in tokenizer.decoder.modules():
        if isinstance(module, SpatialNormSiLU):
            _subtract(module.conv_y, level)
            _subtract(module.conv_b, level)


@torch.no_grad()
def _initialise(tokenizer: VisionTokenizer) -> None:
    """Random weights, except that mean colours pass through.

    In the encoder every stage averages 2x2 pixels of red, green and blue, and three channels of a
    latent are a block's colour; in the decoder the last norm's shift adds it to the block. Residual
    branches and attention start small. From random weights alone this takes hundreds of steps,
    because group norms remove brightness.
    """
    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.reset_parameters()
            nn.init.zeros_(module.bias)
    for module in tokenizer.modules():
        if isinstance(module, ResBlock | Attention):
            last = module.conv2 if isinstance(module, ResBlock) else module.proj_out
            last.weight.mul_(0.1)
        if isinstance(module, SpatialNormSiLU):
            nn.init.ones_(module.conv_y.bias)
    s = tokenizer.settings
    room = s.code_width >= 3 and min(s.widths) >= 3
    if room and s.widths[-1] // s.groups >= _SMALLEST_GROUP:
        _colours_in(tokenizer.encoder)
        _colours_out(tokenizer.decoder)
    if s.ema_decay is not None and s.dead_code_threshold > 0:
        # Clusters of size 0: the first step moves all codes to latents.
        tokenizer.quantize.cluster_size.zero_()
        tokenizer.quantize.sums.zero_()


def _colours_in(encoder: Encoder) -> None:
    _keep(encoder.conv_in, 3)
    for stage in encoder.down:
        for block in stage.block:
            if block.nin_shortcut is not None:
                _keep(block.nin_shortcut, 3)
        if hasattr(stage, "downsample"):
            _keep(stage.downsample.conv, 3)
            stage.downsample.conv.weight[range(3), range(3), :2, :2] = 1 / 4
    # The rest of the colours' group is constant and large, so that the norm only scales them.
    norm = encoder.norm_out
    constants = torch.zeros(norm.num_channels // norm.num_groups)
    constants[3::2], constants[4::2] = _CONSTANT, -_CONSTANT
    encoder.mid.block_2.conv2.bias[: len(constants)] = constants
    mean, deviation = constants.mean(), constants.std(correction=0)
    level, derivative = _silu_at(_LIFT)
    norm.bias[:3] = _LIFT + mean / deviation
    _keep(encoder.conv_out, 3)
    encoder.conv_out.weight[:3] *= deviation / derivative
    encoder.conv_out.bias[:3] = -level * deviation / derivative


def _colours_out(decoder: Decoder) -> None:
    norm, (level, derivative) = decoder.norm_out, _silu_at(_LIFT)
    for conv, shift in ((norm.conv_y, 0.0), (norm.conv_b, _LIFT)):
        conv.weight[:3] = 0
        conv.bias[:3] = shift
    norm.conv_b.weight[range(3), range(3), 0, 0] = 1.0
    decoder.conv_out.weight.mul_(0.1)
    decoder.conv_out.weight[range(3), range(3), 1, 1] = 1 / derivative
    decoder.conv_out.bias -= level / derivative


def _keep(conv: nn.Conv2d, channels: int) -> None:
    """Make the convolution the identity on the first channels."""
    middle = conv.kernel_size[0] // 2
    conv.weight[:channels] = 0
    conv.weight[range(channels), range(channels), middle, middle] = 1.0


def _of_images(tokenizer: VisionTokenizer, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MoVQGAN's layers where it has them, ours where it has none; new codes are near its own."""
    own = tokenizer.state_dict()
    tensors = {name: own[name] for name in own if ".time_" in name or "quant_conv." in name}
    tensors |= {name: v for name, v in found.items() if name.startswith(("encoder.", "decoder."))}
    codes, lacking = found[_CODES], max(0, len(own[_CODES]) - len(found[_CODES]))
    near = codes[torch.randint(len(codes), (lacking,))]
    tensors[_CODES] = torch.cat((codes, near + 0.1 * codes.std() * torch.randn_like(near)))
    return tensors


def _fill(tokenizer: VisionTokenizer, tensors: Mapping[str, Tensor], path: Path) -> None:
    own = tokenizer.state_dict()
    means = {name: own[name] for name in RUNNING_MEANS if name in own}
    others = {name: value for name, value in tensors.items() if name not in RUNNING_MEANS}
    fill(tokenizer, {**others, **means}, path)
    tokenizer.quantize.restart()


def _let_through(conv: nn.Conv3d, frames: int, lift: float, *, first: bool) -> None:
    """Make ``silu(conv(x))``, to first order, the newest ``frames``' mean plus ``silu(lift)``."""
    middle, (level, derivative) = conv.kernel_size[1] // 2, _silu_at(lift)
    nn.init.zeros_(conv.weight)
    nn.init.constant_(conv.bias, lift - (0.0 if first else level / derivative))
    for channel in range(conv.out_channels):
        conv.weight[channel, channel, -frames:, middle, middle] = 1 / (derivative * frames)


def _mix(conv: nn.Conv3d, mixing: Mapping[str, Tensor] | None, name: str, level: float) -> None:
    """Mix the channels of the newest frame alone, after ``level`` is subtracted."""
    matrix, bias = torch.eye(conv.out_channels), torch.zeros(conv.out_channels)
    if mixing is not None:
        matrix, bias = mixing[f"{name}.weight"].flatten(1), mixing[f"{name}.bias"]
    nn.init.zeros_(conv.weight)
    conv.weight[:, :, -1, 0, 0] = matrix
    conv.bias.copy_(bias - level * matrix.sum(1))


def _subtract(conv: nn.Conv2d, level: float) -> None:
    """Subtract ``level`` from the convolution's input (but for the zero padding)."""
    conv.bias -= level * conv.weight.sum((1, 2, 3))


def _silu_at(x: float) -> tuple[float, float]:
    """Value and derivative of SiLU."""
    gate = 1 / (1 + math.exp(-x))
    return x * gate, gate * (1 + x * (1 - gate))
