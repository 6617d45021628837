"""The images that a row is about, read again: for voters, captions and the report."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from emu3.data.media import decode, read_image, upright_rows
from emu3.tools.curate.decide import Row
from emu3.tools.curate.inputs import opened
from emu3.tools.curate.measure import sampled_frames


def images_of(row: Row, frames: Sequence[int] | None = None) -> list[Tensor]:
    """An image, or frames of a clip, as ``[3, H, W]`` uint8.

    Args:
        frames: counted from the start of the video; None takes those that the scores are of.

    Raises:
        MediaError: the file is no longer what it was.
    """
    with opened(row) as content:
        if row["kind"] == "image":
            return [read_image(content)]
        wanted = sampled_frames(row["first"], row["stop"]) if frames is None else frames
        found = _decoded(row, content, set(wanted))
        if missing := set(wanted) - found.keys():
            raise ValueError(f"curate: {row['source']} has no frame {min(missing)} any more")
        return [found[number] for number in wanted]


def _decoded(row: Row, path: object, wanted: Collection[int]) -> dict[int, Tensor]:
    found = {}
    span = row["begin"], row["end"]
    for number, (_, frame) in enumerate(decode(path, span), row["first"]):
        if number in wanted:
            rows = upright_rows(frame)
            found[number] = torch.from_numpy(np.ascontiguousarray(rows)).permute(2, 0, 1)
        if len(found) == len(wanted):
            break
    return found
