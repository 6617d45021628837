"""The discriminator of reconstructions: a PatchGAN with hinge losses, as in MoVQGAN.

Isola et al. 2017 (the discriminator), Lim and Ye 2017 (the hinge), Esser et al. 2021 (both for
vector-quantized images).
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Score every patch of an image: ``[B, 3, H, W]`` to scores ``[B, 1, h, w]``.

    With two layers the receptive field is 34 x 34 pixels and the stride 4.
    """

    def __init__(self, channels: int = 64, layers: int = 2) -> None:
        super().__init__()
        widths = [channels * min(2**number, 8) for number in range(layers + 1)]
        body: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for number in range(1, layers + 1):
            stride = 2 if number < layers else 1
            body += [
                nn.Conv2d(widths[number - 1], widths[number], 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[number]),
                nn.LeakyReLU(0.2),
            ]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2`` of the scores."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """``-mean fake``: maximises the discriminator's score."""
    return -fake.mean()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
