"""Images to pixels and back, as Emu3's image processor does it."""

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


@pytest.mark.parametrize("size", [(143, 700), (3, 12), (1, 1)])
def test_a_side_is_never_empty_however_few_the_pixels(size):
    """143 x 700 became 0 x 32."""
    assert min(smart_resize(*size, min_pixels=1, max_pixels=300)) >= 8
    assert smart_resize(143, 700, min_pixels=1, max_pixels=300) == (8, 32)


def test_pixels_are_the_released_processor_s():
    image = gradient(300, 420)
    height, width = smart_resize(300, 420)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    expected = (np.asarray(resized, dtype=np.float64) / 255 - 0.5) / 0.5
    for form in (image, torch.from_numpy(image), Image.fromarray(image)):
        pixels = preprocess(form)
        assert pixels.dtype == torch.float32
        np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_an_image_of_the_right_size_comes_back_to_the_level():
    image = gradient(16, 32)
    pixels = preprocess(image, min_pixels=1, max_pixels=512)
    (again,) = postprocess(pixels)
    assert np.array_equal(np.asarray(again), image)
    assert len(postprocess(pixels.expand(2, 3, -1, -1, -1))) == 6


def test_values_outside_the_range_are_clamped():
    (image,) = postprocess(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_of_pillow_become_three_channels(mode):
    image = Image.fromarray(gradient(32, 32)).convert(mode)
    assert preprocess(image, min_pixels=1).shape == (3, 32, 32)


def test_16_bit_grey_is_rounded_and_not_cut_off():
    """Everything above 255 of 65535 was white."""
    levels = np.array([[0, 128, 129, 65407] * 2] * 8, dtype=np.uint16)
    (image,) = postprocess(preprocess(Image.fromarray(levels), min_pixels=1))
    assert np.asarray(image)[0, :4].tolist() == [[0] * 3, [0] * 3, [1] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_white(mode):
    """It was black, or the colour hidden under it."""
    pixels = preprocess(Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode), min_pixels=1)
    assert pixels.eq(1).all()


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (Image.new("La", (8, 8)), "must be RGB, RGBA, .*, or grey of 8 or 16 bits, got mode La"),
        (Image.new("F", (8, 8)), "got mode F"),
        (Image.new("RGBA", (0, 8)), "must have pixels, got 8 x 0"),
        (np.zeros((10, 51, 3), np.uint8), "may be 5 times the other at most, got 10 x 51"),
        (np.zeros((0, 8, 3), np.uint8), "must have pixels, got 0 x 8"),
        (np.zeros((8, 8, 4), np.uint8), r"must be uint8 \[H, W, 3\], got uint8 \[8, 8, 4\]"),
        (np.zeros((8, 8), np.uint8), r"must be uint8 \[H, W, 3\], got uint8 \[8, 8\]"),
        (np.zeros((8, 8, 3), np.float32), r"must be uint8 \[H, W, 3\], got float32 \[8, 8, 3\]"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(image, line):
    with pytest.raises(ValueError, match=line) as fault:
        preprocess(image)
    assert "\n" not in str(fault.value)


def test_pixels_of_another_channel_count_are_refused():
    with pytest.raises(ValueError, match=r"must be \[\.\.\., 3, H, W\], got \(4, 8, 8\)"):
        postprocess(torch.zeros(4, 8, 8))
