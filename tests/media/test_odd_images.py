"""Images as scanners, cameras and editors write them: each kind against the pixels it encodes."""

import numpy as np
import pytest
from PIL import Image, TiffTags

from emu3.data.media import read_image
from emu3.vision import postprocess, preprocess
from tests.media.odd_images import (
    MINISBLACK,
    MINISWHITE,
    ORIENTATION,
    RGB,
    chunk,
    corpus,
    entry,
    exif,
    photograph,
    png,
    saved,
    tiff,
)

E2E = pytest.mark.e2e
GREY = np.arange(0, 256, 17, dtype=np.uint8).reshape(2, 8)
COLORS = np.stack([GREY, 255 - GREY, np.full_like(GREY, 100)], -1)
HALF = np.full_like(GREY, 128)
ON_WHITE = np.round(COLORS * (128 / 255) + 127).astype(np.uint8)


def wide(levels: np.ndarray) -> np.ndarray:
    return levels.astype(np.uint16) * 257


def read(whole: bytes, folder) -> np.ndarray:
    """``[H, W, 3]`` of a file of these bytes."""
    (folder / "x").write_bytes(whole)
    return read_image(folder / "x").permute(1, 2, 0).numpy()


def error(pixels: np.ndarray, exact: np.ndarray) -> int:
    """The largest difference of levels; grey is compared with every channel."""
    exact = exact if exact.ndim == 3 else exact[..., None]
    return np.abs(pixels.astype(int) - exact).max()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deepen", [np.asarray, wide], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize(
    "kind", ["black is zero", "white is zero", "rgb", "alpha", "premultiplied"]
)
def test_16_bits_mean_what_8_bits_mean(kind, deepen, order, tmp_path):
    """16-bit grey whose zero is white was read as its negative, without a word."""
    straight, premultiplied = np.dstack([COLORS, HALF]), np.dstack([COLORS // 2, HALF])
    pixels, photometric, extra, exact = {
        "black is zero": (GREY, MINISBLACK, (), GREY),
        "white is zero": (255 - GREY, MINISWHITE, (), GREY),
        "rgb": (COLORS, RGB, (), COLORS),
        "alpha": (straight, RGB, (2,), ON_WHITE),
        "premultiplied": (premultiplied, RGB, (1,), ON_WHITE),
    }[kind]
    whole = tiff(deepen(pixels), photometric, order=order, extra=extra)
    if (kind, deepen, order) == ("white is zero", wide, ">"):
        with pytest.raises(ValueError, match="unknown channels"):
            read(whole, tmp_path)
        return
    assert error(read(whole, tmp_path), exact) <= (2 if extra else 0)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deepen", [np.asarray, wide], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("kind", ["rgb", "alpha"])
def test_planes_of_16_bits_are_planes_of_8(kind, deepen, order, tmp_path):
    """A microscope's separate planes of 16 bits were unpacked as bytes: stripes, no word."""
    pixels = np.dstack([COLORS, HALF]) if kind == "alpha" else COLORS
    extra = (2,) if kind == "alpha" else ()
    whole = tiff(deepen(pixels), RGB, order=order, extra=extra, planar=True)
    exact = ON_WHITE if kind == "alpha" else COLORS
    assert error(read(whole, tmp_path), exact) <= (2 if extra else 0)


def test_a_scanner_s_negative_is_positive_for_the_model_too(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(wide(255 - GREY).repeat(8, 0), MINISWHITE))
    with Image.open(tmp_path / "x.tif") as image:
        (again,) = postprocess(preprocess(image, min_pixels=1))
    assert error(np.asarray(again.resize((8, 16))), GREY.repeat(8, 0)) == 0


def test_12_bits_fill_the_range(tmp_path):
    """A sensor's 12 bits were read as the lowest twelve of sixteen, nearly black."""
    levels = np.array([0x000, 0x800, 0xFFF, 0x7F8])
    packed = np.array([[0x00, 0x08, 0x00, 0xFF, 0xF7, 0xF8]], dtype=np.uint8)
    pixels = read(tiff(packed, MINISBLACK, depth=12), tmp_path)
    assert pixels[0, :, 0].tolist() == np.round(levels / 4095 * 255).tolist()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_level_of_a_png_is_white_at_every_depth(depth, tmp_path):
    """Its level counts in the file's depth, and was compared with levels of 8 bits."""
    white = 2**depth - 1
    levels = np.array([[0, white // 2, white]])
    chosen = white // 2
    pixels = read(png(levels, 0, chunk(b"tRNS", chosen.to_bytes(2, "big")), depth=depth), tmp_path)
    exact = np.round(levels / white * 255)
    exact[levels == chosen] = 255
    assert pixels[..., 0].tolist() == exact.tolist()


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_color_of_a_png_is_white_at_every_depth(depth, tmp_path):
    color = [0x12, 0x56, 0x9A] if depth == 8 else [0x1234, 0x5678, 0x9ABC]
    row = np.array([[color, [0, 0, 0]]])
    trns = b"".join(level.to_bytes(2, "big") for level in color)
    pixels = read(png(row, 2, chunk(b"tRNS", trns), depth=depth), tmp_path)
    assert pixels[0].tolist() == [[255] * 3, [0] * 3]


TURNS = {
    1: lambda rows: rows,
    2: np.fliplr,
    3: lambda rows: np.rot90(rows, 2),
    4: np.flipud,
    5: lambda rows: rows.swapaxes(0, 1),
    6: lambda rows: np.rot90(rows, -1),
    7: lambda rows: np.rot90(rows, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_all_eight_orientations_are_turned(orientation, kind, tmp_path):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    whole = saved(photograph(), kind, exif=tags, **({"lossless": True} if kind == "WEBP" else {}))
    assert error(read(whole, tmp_path), TURNS[orientation](np.asarray(photograph()))) == 0


VALUES = {
    1: b"\x07",
    2: b"abc\0",
    3: b"\5\0",
    4: b"\5\0\0\0",
    5: b"\1\0\0\0\3\0\0\0",
    6: b"\xfe",
    7: b"xyz\0",
    8: b"\xfd\xff",
    9: b"\xfd\xff\xff\xff",
    10: b"\xff\xff\xff\xff\3\0\0\0",
    11: b"\0\0\xc0\x3f",
    12: b"\0\0\0\0\0\0\xf8\x3f",
}
"""A value of each type of EXIF."""
LENGTHS = {2: 4, 7: 4}
TAGS = [tag for tag in TiffTags.TAGS_V2 if 0x100 <= tag <= 0xFFFF and tag != ORIENTATION]
PRIVATE = [0x9286, 0x8769, 0x8825, 0xA005, 0x9003, 0x829A, 0x927C, 0xC4A5]


TIMES = pytest.mark.parametrize("times", [2, *(pytest.param(n, marks=E2E) for n in (1, 9))])
"""Values in a tag; two are no number, and do not fit into their entry."""


def variants(tags, times: int):
    """Each tag as each type."""
    for tag in (*tags, *PRIVATE):
        for kind, value in VALUES.items():
            yield tag, kind, LENGTHS.get(kind, 1) * times, value * times


def with_exif(data: bytes) -> bytes:
    whole = saved(photograph(), "JPEG")
    return whole[:2] + b"\xff\xe1" + (len(data) + 2).to_bytes(2, "big") + data + whole[2:]


@TIMES
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_tag_of_a_photograph_s_exif_keeps_it_from_being_turned(times, tmp_path):
    """A resolution stored as text ended a whole run; 1,956 such photographs were refused."""
    for one in variants(TAGS, times):
        assert read(with_exif(exif(one)), tmp_path).shape == (32, 24, 3), one


# Tags without which no TIFF can be read, and those that say how its pixels are stored.
STORAGE = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 297, 317, 320),
    *(322, 323, 324, 325, 330, 338, 339, 347, 512, 513, 514, 529, 530, 531, 532, 50838, 50839),
}


@TIMES
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_tag_of_a_tiff_keeps_it_from_being_turned(times, tmp_path):
    """Pillow turns a TIFF itself while it decodes."""
    exact = np.rot90(np.asarray(photograph()), -1)
    for one in variants([tag for tag in TAGS if tag not in STORAGE], times):
        more = [entry(ORIENTATION, "H", 6), one]
        whole = tiff(np.asarray(photograph()), RGB, more=more)
        assert error(read(whole, tmp_path), exact) == 0, one


@pytest.mark.parametrize(
    "data",
    [b"", b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0XX*\0\x08\0\0\0", exif()[:20], b"\xff" * 50],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_read_costs_the_turn_alone(kind, data, tmp_path):
    whole = saved(photograph(), kind, exif=data)
    assert read(whole, tmp_path).shape == (24, 32, 3)


def test_the_whole_corpus_is_read(tmp_path):
    for name, whole in corpus().items():
        assert read(whole, tmp_path).shape in ((24, 32, 3), (32, 24, 3)), name
