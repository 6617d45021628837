"""Pictures to pixels and back, as Emu3's image processor does it."""

import numpy as np
import pytest
import torch
from PIL import Image

from emu3.vision import postprocess, preprocess, smart_resize


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack(
        (rows * 255 // height, columns * 255 // width, (rows + columns) % 256), -1
    ).astype(np.uint8)


@pytest.mark.parametrize(
    "size", [(480, 640), (100, 500), (1, 1), (3000, 1999), (513, 512), (724, 724)]
)
def test_sizes_are_hugging_face_s(size):
    from transformers.models.emu3.image_processing_emu3 import smart_resize as theirs

    ours = smart_resize(*size)
    assert ours == theirs(*size, factor=8, min_pixels=512 * 512, max_pixels=1024 * 1024)
    assert ours[0] % 8 == ours[1] % 8 == 0


def test_pixels_are_the_released_processor_s():
    picture = gradient(300, 420)
    height, width = smart_resize(300, 420)
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    expected = (np.asarray(resized, dtype=np.float64) / 255 - 0.5) / 0.5
    for form in (picture, torch.from_numpy(picture), Image.fromarray(picture)):
        pixels = preprocess(form)
        assert pixels.dtype == torch.float32
        np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_a_picture_of_the_right_size_comes_back_to_the_level():
    picture = gradient(16, 32)
    pixels = preprocess(picture, min_pixels=1, max_pixels=512)
    (again,) = postprocess(pixels)
    assert np.array_equal(np.asarray(again), picture)
    assert len(postprocess(pixels.expand(2, 3, -1, -1, -1))) == 6


def test_values_outside_the_range_are_clamped():
    (picture,) = postprocess(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1))
    assert picture.getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_of_pillow_become_three_channels(mode):
    picture = Image.fromarray(gradient(32, 32)).convert(mode)
    assert preprocess(picture, min_pixels=1).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("picture", "line"),
    [
        (np.zeros((10, 51, 3), np.uint8), "may be 5 times the other at most, got 10 x 51"),
        (np.zeros((0, 8, 3), np.uint8), "must have pixels, got 0 x 8"),
        (np.zeros((8, 8, 4), np.uint8), r"must be uint8 \[H, W, 3\], got uint8 \[8, 8, 4\]"),
        (np.zeros((8, 8), np.uint8), r"must be uint8 \[H, W, 3\], got uint8 \[8, 8\]"),
        (np.zeros((8, 8, 3), np.float32), r"must be uint8 \[H, W, 3\], got float32 \[8, 8, 3\]"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(picture, line):
    with pytest.raises(ValueError, match=line) as fault:
        preprocess(picture)
    assert "\n" not in str(fault.value)


def test_pixels_of_another_channel_count_are_refused():
    with pytest.raises(ValueError, match=r"must be \[\.\.\., 3, H, W\], got \(4, 8, 8\)"):
        postprocess(torch.zeros(4, 8, 8))
