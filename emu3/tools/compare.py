"""Original and reconstruction side by side, with PSNR and SSIM."""

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

    PSNR and SSIM are of 8-bit RGB at the encoded size; of a video the mean over its frames. An
    infinite PSNR, of equal images, is written as null.

    Args:
        pairs: original and reconstruction, ``[3, H, W]`` uint8, frame by frame.
    """
    metrics: list[tuple[float, float]] = []

    def measured() -> Iterator[Tensor]:
        for one, other in pairs:
            metrics.append(fidelity(one, other))
            yield torch.cat((one, other), dim=2)

    if header.fps is None:
        write_image(Path(f"{source}.png"), next(measured()))
    else:
        write_video(Path(f"{source}.mp4"), measured(), Fraction(header.fps))
    psnr, ssim = (fmean(values) for values in zip(*metrics, strict=True))
    report = {
        "source": header.source,
        "frames": len(metrics),
        "psnr": psnr if math.isfinite(psnr) else None,
        "ssim": ssim,
    }
    with replacing(Path(f"{source}.json")) as draft:
        draft.write_text(json.dumps(report) + "\n")


def fidelity(original: Tensor, reconstruction: Tensor) -> tuple[float, float]:
    """PSNR in dB, and SSIM, of ``[3, H, W]`` uint8."""
    one, other = (image[None].float() for image in (reconstruction, original))
    psnr = peak_signal_noise_ratio(one, other, data_range=255.0)
    ssim = structural_similarity_index_measure(one, other, data_range=255.0)
    return psnr.item(), ssim.item()
