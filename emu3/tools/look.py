"""Images and videos on disk as parts of a prompt."""

from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emu3.data.media import IMAGES, VIDEOS, open_video, read_image
from emu3.prompt import Clip
from emu3.text import QwenTokenizer
from emu3.tools.tokenize import encode_video
from emu3.vision import preprocess
from emu3.vision.images import MAX_PIXELS, MIN_PIXELS
from emu3.weights import Pretrained


def is_video(path: Path) -> bool:
    """Whether a file is a video, and not an image, by its suffix.

    Raises:
        ValueError: neither.
    """
    suffix = path.suffix.lower()
    if suffix not in IMAGES | VIDEOS:
        known = ", ".join(sorted(IMAGES | VIDEOS))
        raise ValueError(f"{path}: an image or a video must end in one of {known}")
    return suffix in VIDEOS


def look(
    path: Path,
    loaded: Pretrained,
    *,
    area: int | None = None,
    fps: Fraction | None = None,
    whole: bool = True,
) -> Tensor | Clip:
    """Codes ``[h, w]`` of an image, or a clip, resized as the model was trained.

    Args:
        path: of the file.
        loaded: whose vision tokenizer encodes.
        area: pixels, about; None resizes as Emu3's image processor does. A model that was trained
            here takes squares of one size.
        fps: frames a second that are taken of a video; None takes all.
        whole: what becomes of frames of a video beyond the last whole frame of codes: it is
            filled with the last one; otherwise the first ones are left out.

    Raises:
        ValueError: one line, for a file that cannot be read.
    """
    vision = loaded.vision
    side = None if is_published(loaded) else vision.settings.image_size
    if not is_video(path):
        return vision.encode(
            resized(read_image(path), side, area).to(vision.codebook.device)[None]
        )[0]
    span = vision.settings.temporal_factor
    if span == 1:
        raise ValueError(f"{path}: the vision tokenizer takes images alone")
    video = open_video(path, fps)
    num_frames = 0 if whole else sum(1 for _ in video)
    first = num_frames % span if num_frames > span else 0
    device = vision.codebook.device
    frames = (resized(frame, side, area).to(device) for frame in islice(video, first, None))
    return Clip(encode_video(vision, frames, "pieces"), video.fps, span)


def is_published(loaded: Pretrained) -> bool:
    """Whether it is a published model, or one of its kind, and not a miniature."""
    return isinstance(loaded.text, QwenTokenizer)


def resized(image: Tensor, side: int | None = None, area: int | None = None) -> Tensor:
    """An image ``[3, H, W]`` uint8 as pixels in [-1, 1].

    Args:
        image: of any size.
        side: of the square that it becomes; None resizes as Emu3's image processor does.
        area: pixels that it then has, about; None lets it keep its own within Emu3's bounds.
    """
    rows = image.permute(1, 2, 0).numpy()
    if side is None:
        return preprocess(rows, min_pixels=area or MIN_PIXELS, max_pixels=area or MAX_PIXELS)
    square = Image.fromarray(rows).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1
