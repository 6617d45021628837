"""Image files byte by byte, of kinds that no encoder here writes, and a corpus of all kinds."""

import io
import struct
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
MINISBLACK, MINISWHITE, RGB, PALETTE, CMYK = 1, 0, 2, 3, 5
Entry = tuple[int, int, int, bytes]
"""Tag, type, count and the value's bytes of an entry of an image file directory."""

_SIZES = {"B": 1, "H": 3, "I": 4}
"""Types of TIFF by letters of ``struct``."""


def directory(entries: Iterable[Entry], order: str, offset: int) -> bytes:
    """An image file directory for ``offset``; values of more than 4 bytes follow it."""
    entries = sorted(entries)
    behind = offset + 2 + 12 * len(entries) + 4
    table, values = struct.pack(f"{order}H", len(entries)), b""
    for tag, kind, count, value in entries:
        table += struct.pack(f"{order}HHI", tag, kind, count)
        if len(value) <= 4:
            table += value.ljust(4, b"\0")
            continue
        table += struct.pack(f"{order}I", behind + len(values))
        values += value + b"\0" * (len(value) % 2)
    return table + bytes(4) + values


def entry(tag: int, letter: str, *values: int, order: str = "<") -> Entry:
    return tag, _SIZES[letter], len(values), struct.pack(f"{order}{len(values)}{letter}", *values)


def tiff(
    pixels: np.ndarray,
    photometric: int,
    *,
    order: str = "<",
    depth: int | None = None,
    extra: tuple[int, ...] = (),
    planar: bool = False,
    more: Iterable[Entry] = (),
) -> bytes:
    """An uncompressed TIFF of ``[H, W]`` or ``[H, W, C]`` uint8 or uint16.

    Args:
        depth: bits per sample if ``pixels`` are packed already, as ``[H, bytes]``.
        planar: the channels one behind the other.
        extra: meanings of the samples beyond the colors: 1 premultiplied alpha, 2 alpha.
    """
    height, width, *channels = pixels.shape
    samples = channels[0] if channels else 1
    rows = np.moveaxis(pixels, -1, 0) if planar else pixels
    data = rows.astype(rows.dtype.newbyteorder(order)).tobytes()
    strips = samples if planar else 1
    length = len(data) // strips
    data += b"\0" * (len(data) % 2)
    if depth:
        width = width * 8 // depth
    bits = depth or 8 * pixels.itemsize
    tags = {
        256: ("I", width),
        257: ("I", height),
        258: ("H", *[bits] * samples),
        259: ("H", 1),
        262: ("H", photometric),
        273: ("I", *range(8, 8 + strips * length, length)),
        277: ("H", samples),
        278: ("I", height),
        279: ("I", *[length] * strips),
        284: ("H", 2 if planar else 1),
    } | ({338: ("H", *extra)} if extra else {})
    entries = [entry(tag, *value, order=order) for tag, value in tags.items()]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(data))
    return head + data + directory([*entries, *more], order, 8 + len(data))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: np.ndarray, color: int, *chunks: bytes, depth: int = 8) -> bytes:
    """A PNG of ``[H, W]`` or ``[H, W, C]`` levels below ``2 ** depth``."""
    height, width = rows.shape[:2]
    if depth < 8:
        bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        packed = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    else:
        packed = rows.astype(">u2" if depth == 16 else np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in packed)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def exif(*entries: Entry, orientation: int = 6) -> bytes:
    """EXIF data as in a JPEG, of an orientation and other entries."""
    turned = entry(ORIENTATION, "H", orientation)
    return b"Exif\0\0II*\0\x08\0\0\0" + directory([turned, *entries], "<", 8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photograph(height: int = 24, width: int = 32) -> Image.Image:
    """Smooth colors with a little noise, the same at every call."""
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack((8 * rows, 6 * columns, 4 * (rows + columns)), -1)
    noise = np.random.default_rng(0).integers(0, 24, (height, width, 3))
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def corpus() -> dict[str, bytes]:
    """Small whole images of every format that is read, and of many kinds within it."""
    rgb = photograph()
    rgba, grey = rgb.convert("RGBA"), rgb.convert("L")
    rgba.putalpha(grey)
    wide = np.asarray(grey).astype(np.uint16) * 257
    red = np.asarray(rgb).astype(np.uint16) * 257
    turned = exif(entry(0x011A, "H", 72), (0x010F, 2, 6, b"maker\0"))
    pages = {"save_all": True, "append_images": [rgb.rotate(180), rgb]}
    return {
        "rgb.png": saved(rgb, "PNG", exif=turned),
        "rgba.png": saved(rgba, "PNG"),
        "palette.png": saved(rgb.quantize(16), "PNG", transparency=3),
        "animation.png": saved(rgb, "PNG", **pages),
        "grey2.png": png(np.asarray(grey) >> 6, 0, chunk(b"tRNS", b"\0\1"), depth=2),
        "grey16.png": png(wide, 0, chunk(b"tRNS", b"\x40\x40"), depth=16),
        "rgb16.png": png(red, 2, depth=16),
        "baseline.jpg": saved(rgb, "JPEG", exif=turned),
        "progressive.jpg": saved(rgb, "JPEG", progressive=True, icc_profile=bytes(200)),
        "grey.jpg": saved(grey, "JPEG"),
        "cmyk.jpg": saved(rgb.convert("CMYK"), "JPEG"),
        "two.jpg": saved(rgb, "MPO", save_all=True, append_images=[rgb.rotate(180)]),
        "raw.tif": tiff(np.asarray(rgb), RGB, more=[entry(ORIENTATION, "H", 6)]),
        "white16.tif": tiff(wide, MINISWHITE),
        "alpha16.tif": tiff(np.dstack([red, wide]), RGB, order=">", extra=(2,)),
        "lzw.tif": saved(rgb, "TIFF", compression="tiff_lzw"),
        "deflate.tif": saved(grey, "TIFF", compression="tiff_adobe_deflate"),
        "packbits.tif": saved(rgb.quantize(8), "TIFF", compression="packbits"),
        "jpeg.tif": saved(rgb, "TIFF", compression="jpeg"),
        "fax.tif": saved(rgb.convert("1"), "TIFF", compression="group4"),
        "pages.tif": saved(rgb, "TIFF", **pages),
        "lossy.webp": saved(rgb, "WEBP", exif=turned),
        "lossless.webp": saved(rgba, "WEBP", lossless=True),
        "animation.webp": saved(rgb, "WEBP", **pages, duration=40),
        "rgb.bmp": saved(rgb, "BMP"),
        "palette.bmp": saved(rgb.quantize(16), "BMP"),
    }
