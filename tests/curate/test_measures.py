"""Scores of frames whose motion, text, light and likeness are known."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from emu3.data.media import decode
from emu3.tools.curate.measures import (
    can_flow,
    flow,
    grey,
    perceptual_hash,
    shrunk,
    text_cover,
)
from tests.curate.making import real_clip, subtitled, texture


def frame_of(name: str) -> np.ndarray:
    return next(frame for _, frame in decode(real_clip(name))).to_ndarray(format="rgb24")


@pytest.mark.parametrize("pixels", [1, 4, 16])
def test_the_flow_of_a_shifted_frame_is_the_shift_over_its_short_edge(pixels):
    frame = grey(shrunk(frame_of("bigbuckbunny"), 256))
    shifted = cv2.warpAffine(
        frame,
        np.float32([[1, 0, pixels], [0, 1, 0]]),
        frame.shape[::-1],
        borderMode=cv2.BORDER_REPLICATE,
    )
    assert flow(frame, shifted) == pytest.approx(pixels / 256, rel=0.12)
    assert flow(frame, frame) < 1e-4


def test_text_covers_what_is_written_on_and_nothing_of_a_frame_without_text():
    plain = texture(3)
    (written,) = subtitled(iter([plain]))
    assert text_cover(plain, 256, 0.8) == 0
    # Two lines of letters 20 pixels high, over most of the width.
    assert 0.12 < text_cover(written, 256, 0.8) < 0.35


@pytest.mark.parametrize("shape", [(1, 1), (2, 3000), (3000, 2), (9, 9)])
def test_a_frame_of_any_shape_is_measured_in_no_long_time(shape):
    """Enlarged to its short edge, a strip would have more pixels than the memory holds."""
    frame = np.zeros((*shape, 3), np.uint8)
    assert text_cover(frame, 256, 0.8) == 0
    assert can_flow(grey(frame)) is False
    assert perceptual_hash(grey(frame)) == 0


def test_a_hash_survives_jpeg_and_half_the_size_and_tells_images_apart():
    def bits(a, b):
        return (perceptual_hash(grey(a)) ^ perceptual_hash(grey(b))).bit_count()

    for name in ("bikes", "bigbuckbunny", "carphone_pristine"):
        frame = frame_of(name)
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=40)
        assert bits(frame, np.asarray(Image.open(file))) <= 4
        assert bits(frame, shrunk(frame, min(frame.shape[:2]) // 2)) <= 4
    apart = [bits(texture(a), texture(b)) for a in range(12) for b in range(a)]
    assert min(apart) > 8
