"""Original and reconstruction side by side, and what the reconstruction lost."""

import json
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from emu3.data.codes import Header
from emu3.data.media import write_image, write_video
from emu3.files import replacing


def compare(source: Path, pairs: Iterable[tuple[Tensor, Tensor]], header: Header) -> None:
    """Write ``source.png`` or ``.mp4``, original left, and ``source.json`` with PSNR and SSIM.

    The figures are of 8-bit RGB at the size that was encoded; a video's are the mean over its
    frames. An infinite PSNR, where nothing was lost, is written as null.

    Args:
        pairs: original and reconstruction, ``[3, H, W]`` uint8, frame by frame.
    """
    figures: list[tuple[float, float]] = []

    def measured() -> Iterator[Tensor]:
        for one, other in pairs:
            figures.append(fidelity(one, other))
            yield torch.cat((one, other), dim=2)

    if header.fps is None:
        write_image(Path(f"{source}.png"), next(measured()))
    else:
        write_video(Path(f"{source}.mp4"), measured(), Fraction(header.fps))
    psnr, ssim = (fmean(values) for values in zip(*figures, strict=True))
    told = {
        "source": header.source,
        "frames": len(figures),
        "psnr": psnr if math.isfinite(psnr) else None,
        "ssim": ssim,
    }
    with replacing(Path(f"{source}.json")) as draft:
        draft.write_text(json.dumps(told) + "\n")


def fidelity(original: Tensor, redrawn: Tensor) -> tuple[float, float]:
    """PSNR in dB, and SSIM, of ``[3, H, W]`` uint8."""
    one, other = (image[None].float() for image in (redrawn, original))
    psnr = peak_signal_noise_ratio(one, other, data_range=255.0)
    ssim = structural_similarity_index_measure(one, other, data_range=255.0)
    return psnr.item(), ssim.item()
