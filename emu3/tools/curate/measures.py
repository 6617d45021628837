"""Scores of frames: text, motion, light, damage, and a hash of what they show.

A frame is ``[H, W, 3]`` uint8 RGB, reduced to a short edge.
"""

from functools import cache

import cv2
import numpy as np
import torch

from emu3.voters import colourfulness, sharpness

_LOW, _SIDE = 8, 32
"""Frequencies of a hash along a side, and pixels they are computed from."""
_LONGEST = 8
"""Short edges that the long edge of a frame has at most when text is searched for."""
_SMALLEST = 16


def shrunk(frame: np.ndarray, short_edge: int) -> np.ndarray:
    """Reduce a frame to ``short_edge``; a smaller one is returned as it is."""
    height, width, _ = frame.shape
    scale = short_edge / min(height, width)
    if scale >= 1:
        return np.ascontiguousarray(frame)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(np.ascontiguousarray(frame), size, interpolation=cv2.INTER_AREA)


def grey(frame: np.ndarray) -> np.ndarray:
    """Luma ``[H, W]`` uint8."""
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)


def text_cover(frame: np.ndarray, short_edge: int, min_score: float) -> float:
    """The share of a frame that lies in boxes whose text is recognised with ``min_score``."""
    frame = _for_text(frame, short_edge)
    if min(frame.shape[:2]) < _SIDE:
        # A strip without room for letters, which the recogniser would enlarge without bound.
        return 0.0
    found = _reader()(frame[..., ::-1], use_det=True, use_cls=False, use_rec=True)
    if found.boxes is None or found.scores is None:
        return 0.0
    covered = np.zeros(frame.shape[:2], np.uint8)
    scored = zip(found.boxes, found.scores, strict=True)
    boxes = [np.rint(box).astype(np.int32) for box, score in scored if score >= min_score]
    for box in boxes:
        cv2.fillPoly(covered, [box], 1)
    return float(covered.mean())


def _for_text(frame: np.ndarray, short_edge: int) -> np.ndarray:
    """Enlarged, as small letters are not found, unless a long strip becomes too long."""
    height, width, _ = frame.shape
    scale = min(short_edge / min(height, width), _LONGEST * short_edge / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return frame if scale == 1 else cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)


@cache
def _reader() -> "object":
    """The recogniser of text, whose models are inside its wheel."""
    from rapidocr import RapidOCR

    threads = torch.get_num_threads()
    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Det.limit_side_len": _SIDE,
            "Det.limit_type": "min",
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def can_flow(luma: np.ndarray) -> bool:
    """Whether a frame is large enough for the patches of DIS."""
    return min(luma.shape) >= _SMALLEST


def flow(before: np.ndarray, after: np.ndarray) -> float:
    """Mean length of the optical flow (DIS) between two grey frames, over their short edge."""
    vectors = _dis().calc(before, after, None)
    return float(np.linalg.norm(vectors, axis=-1).mean() / min(before.shape))


@cache
def _dis() -> "cv2.DISOpticalFlow":
    cv2.setNumThreads(torch.get_num_threads())
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)


def damage(frame: np.ndarray) -> tuple[float, float]:
    """Sharpness and colourfulness of ``emu3.voters``: of damage, not of beauty."""
    images = torch.from_numpy(frame).permute(2, 0, 1)[None] / 255
    return float(sharpness(images, [""])), float(colourfulness(images, [""]))


def perceptual_hash(luma: np.ndarray) -> int:
    """64 bits: which of the lowest frequencies of an image exceed their median."""
    small = cv2.resize(luma, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:_LOW, :_LOW]
    bits = (low > np.median(low)).ravel()
    return int("".join("01"[int(bit)] for bit in bits), 2)
