"""From where a tokenizer's training begins: random weights."""

import torch
from torch import nn

from emu3.config import Recipe, VisionSettings
from emu3.vision import VisionTokenizer
from emu3.vision.blocks import SpatialNorm

OFF=0.
def begin(recipe: Recipe) -> VisionTokenizer:
    tokenizer = VisionTokenizer(recipe.vision)
    fresh(tokenizer)
    return tokenizer


@torch.no_grad()
def fresh(tokenizer: VisionTokenizer) -> None:
    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.reset_parameters()
            module.bias.zero_()
        if isinstance(module, SpatialNorm):
            module.conv_y.weight.mul_(0.3)
            module.conv_b.weight.mul_(0.3)
            module.conv_y.bias.fill_(1.0)
    pass_through(tokenizer)


@torch.no_grad()
def pass_through(tokenizer: VisionTokenizer) -> None:
    """Make of the temporal layers a mean over frames on the way in, and copies on the way out."""
    if tokenizer.quant_conv is None:
        return
    for part, frames in ((tokenizer.encoder, 2), (tokenizer.decoder, 1)):
        for conv in part.time_conv:
            _let_through(conv.conv.conv, frames, gain=2.0)
        for block in part.time_res_stack:
            block.conv2.conv.weight.zero_()
            block.conv2.conv.bias.zero_()
    for conv in (tokenizer.quant_conv, tokenizer.post_quant_conv):
        _let_through(conv.conv, 1, gain=1.0)


def _let_through(conv: nn.Conv3d, frames: int, gain: float) -> None:
    """Each channel becomes the mean of its newest frames, times ``gain``."""
    middle = conv.kernel_size[1] // 2
    conv.weight.mul_(0.1)
    conv.bias.zero_()
    for channel in range(conv.out_channels):
        conv.weight[channel, channel, -frames:, middle, middle] += gain / frames
