"""Perceptual distance between images, by features of an image classifier.

The trainer takes any callable ``(reconstructed, real) -> [B]``. ``Lpips`` is the usual one (Zhang
et al. 2018), with weights from a file; nothing is downloaded.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from emu3.weights import fill, read_tensors

# Mean and deviation of ImageNet's colours, for pixels in [-1, 1].
_MEAN, _DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-8  # in the square: the root has no derivative at 0


class Lpips(nn.Module):
    """Weighted squared distance of unit feature vectors, averaged over positions, summed over taps.

    Args:
        features: layers numbered as torchvision numbers ``vgg16().features``.
        taps: layer numbers of the features, ascending.
        widths: channels of each.
    """

    def __init__(self, features: nn.Sequential, taps: tuple[int, ...], widths: list[int]) -> None:
        super().__init__()
        self.features, self.taps = features, taps
        self.heads = nn.ParameterList(torch.ones(1, width, 1, 1) for width in widths)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(_DEVIATION).view(3, 1, 1), persistent=False)

    def forward(self, reconstructed: Tensor, real: Tensor) -> Tensor:
        """Distances ``[B]`` of ``[B, 3, H, W]`` in [-1, 1]; 0 for equal images."""
        pairs = zip(self._features(reconstructed), self._features(real), self.heads, strict=True)
        return sum(((a - b).square() * head).sum(1).mean((1, 2)) for a, b, head in pairs)

    def _features(self, images: Tensor) -> list[Tensor]:
        x, found = (images - self.mean) / self.deviation, []
        for number, layer in enumerate(self.features[: self.taps[-1] + 1]):
            x = layer(x)
            if number in self.taps:
                found.append(x / (x.square().sum(1, keepdim=True) + _EPS).sqrt())
        return found


def load_lpips(path: Path) -> Lpips:
    """Build LPIPS over VGG16 or AlexNet from one safetensors file.

    It contains the backbone's convolutions under torchvision's names (``features.0.weight`` …) and
    the five heads under those of the LPIPS release (``lin0.model.1.weight`` …). The backbone
    is recognised by its first filter.

    Raises:
        ValueError: one line, if tensors are missing or of another shape.
    """
    tensors, _ = read_tensors(path)
    side = tensors["features.0.weight"].shape[-1] if "features.0.weight" in tensors else 0
    if side not in (3, 11):
        raise ValueError(f"perceptual: {path} holds neither VGG16 nor AlexNet under features.*")
    model = vgg16() if side == 3 else alexnet()
    heads = {f"heads.{i}": tensors.get(f"lin{i}.model.1.weight") for i in range(len(model.taps))}
    body = {name: value for name, value in tensors.items() if name.startswith("features.")}
    fill(model, {**body, **{name: v for name, v in heads.items() if v is not None}}, path)
    return model.requires_grad_(False).eval()


def vgg16() -> Lpips:
    """LPIPS over the convolutions of VGG16 (Simonyan and Zisserman 2014), not yet trained."""
    layers: list[nn.Module] = []
    inputs, taps, widths = 3, [], []
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        taps.append(len(layers) - 1)
        widths.append(width)
        layers.append(nn.MaxPool2d(2))
    return Lpips(nn.Sequential(*layers), tuple(taps), widths)


def alexnet() -> Lpips:
    """LPIPS over the convolutions of AlexNet (Krizhevsky 2014), not yet trained."""
    layers = [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ]
    return Lpips(nn.Sequential(*layers), (1, 4, 7, 9, 11), [64, 192, 384, 256, 256])
