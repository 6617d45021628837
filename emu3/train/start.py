"""From where a tokenizer's training begins: random weights, Emu3's tokenizer, or MoVQGAN.

MoVQGAN (the pictures' half of Emu3's tokenizer, under the same names) has no temporal layers.
Where they are new, they begin as the mean over frames on the way in and as copies on the way out,
so that a clip that stands still is drawn as the picture would be.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from emu3.config import Recipe
from emu3.vision import VisionTokenizer
from emu3.vision.blocks import SpatialNorm
from emu3.weights import fill, load_vision, read_tensors

# SiLU is nearly the identity so far above zero; what comes behind takes it off again.
_LIFT = 6.0
_RUNNING_MEANS = ("quantize.members", "quantize.sums")


def begin(recipe: Recipe) -> VisionTokenizer:
    """The tokenizer of ``recipe.vision`` with the weights of ``recipe.objective.start``.

    Raises:
        ValueError: one line, if the weights are of another shape than ``recipe.vision``.
    """
    tokenizer, start = VisionTokenizer(recipe.vision), recipe.objective.start
    if start is None:
        _draw(tokenizer)
        pass_through(tokenizer)
        return tokenizer
    if start.suffix == ".safetensors" and "quant_conv.weight" in (found := read_tensors(start)[0]):
        pass_through(tokenizer)
        tensors = _inflated(tokenizer, found)
    else:
        tensors = load_vision(start).state_dict()
    kept = {name: value for name, value in tokenizer.state_dict().items() if name in _RUNNING_MEANS}
    fill(tokenizer, {**tensors, **kept}, start)
    tokenizer.quantize.restart()
    return tokenizer


@torch.no_grad()
def pass_through(tokenizer: VisionTokenizer) -> None:
    """Let the temporal layers take the mean of four frames, and repeat it."""
    if tokenizer.quant_conv is None:
        return
    for part, frames in ((tokenizer.encoder, 2), (tokenizer.decoder, 1)):
        for number, layer in enumerate(part.time_conv):
            _let_through(layer.conv.conv, frames, lift=0.0 if number else _LIFT)
        for block in part.time_res_stack:
            nn.init.zeros_(block.conv2.conv.weight)
            nn.init.zeros_(block.conv2.conv.bias)
    _let_through(tokenizer.quant_conv.conv, 1, lift=-_LIFT)
    _let_through(tokenizer.post_quant_conv.conv, 1, lift=0.0)
    _lower(tokenizer.decoder.conv_in)
    for module in tokenizer.decoder.modules():
        if isinstance(module, SpatialNorm):
            _lower(module.conv_y)
            _lower(module.conv_b)


def _let_through(conv: nn.Conv3d, frames: int, *, lift: float) -> None:
    """Each channel becomes the mean of its newest ``frames``, plus ``lift``."""
    middle = conv.kernel_size[1] // 2
    nn.init.zeros_(conv.weight)
    nn.init.constant_(conv.bias, lift)
    for channel in range(conv.out_channels):
        conv.weight[channel, channel, -frames:, middle, middle] = 1 / frames


def _lower(conv: nn.Conv2d) -> None:
    """Take ``_LIFT`` off what the convolution sees (but for the zeros around it)."""
    conv.bias -= _LIFT * conv.weight.sum((1, 2, 3))
