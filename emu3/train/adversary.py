"""The critic of reconstructions: a PatchGAN under hinge losses, as MoVQGAN trains with it.

Isola et al. 2017 (the discriminator), Lim and Ye 2017 (the hinge), Esser et al. 2021 (both for
vector-quantized pictures).
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Judge every patch of a picture by itself: ``[B, 3, H, W]`` to scores ``[B, 1, h, w]``.

    With two layers a score sees 34 x 34 pixels, and four more pixels move it by one.
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

    def forward(self, pictures: Tensor) -> Tensor:
        return self.body(pictures)


def discriminator_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """``(mean max(0, 1 - real) + mean max(0, 1 + drawn)) / 2`` of the scores."""
    return (F.relu(1 - real).mean() + F.relu(1 + drawn).mean()) / 2


def generator_loss(drawn: Tensor) -> Tensor:
    """``-mean drawn``: what is drawn shall score as high as can be."""
    return -drawn.mean()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
