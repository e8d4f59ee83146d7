"""Unusual and damaged images: each is decoded correctly, or rejected with a one-line error.

Test ids are the cases of the project's list of bad inputs. One case is decided by the model's
limit: an image of 499 x 1 is decoded, and then rejected, because its aspect ratio exceeds 200.
"""

from __future__ import annotations

import base64
import functools
import re
import resource
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from qwen2vl.errors import InputError
from qwen2vl.processor.image import unpatchify
from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import DEFAULT_LIMITS
from tests.media import (
    FORMATS,
    VISION,
    animation,
    encoded,
    encoded_video,
    image,
    noise,
    png_header,
    smooth,
)

IMAGE = smooth(150, 200)
LIBRARY_INTERNALS = re.compile(
    r"PIL\.|BytesIO|Traceback|Errno|0x[0-9a-f]{4}|Image\.open|libtiff", re.I
)


def error_text(source: Any, **options: Any) -> str:
    """Return the text of the InputError; check that it is one line without library internals."""
    with pytest.raises(InputError) as caught:
        image(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert not LIBRARY_INTERNALS.search(text), text
    return text


def model_pixels(source: Any, **options: Any) -> np.ndarray:
    """Return the pixels that the model gets, (height, width, 3)."""
    item = image(source, **options)
    assert item.num_tokens > 0
    return unpatchify(item.patches_NP, item.grid, VISION)[0].permute(1, 2, 0).numpy()


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :]


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@functools.cache
def text_bomb() -> bytes:
    """Return a small PNG with a comment that decompresses to 50 MB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 50_000_000, zip=True)
    return encoded(IMAGE, "PNG", pnginfo=info)


@functools.cache
def real_bomb() -> bytes:
    """Return a complete PNG of 12000 x 12000 zeros: 432 MB in less than 2 MB."""
    packer = zlib.compressobj(1)
    row = bytes(1 + 3 * 12000)
    raster = b"".join([packer.compress(row) for _ in range(12000)] + [packer.flush()])
    empty = zlib.compress(b"\0\0\0\0", 9)
    head, tail = png_header(12000, 12000).split(empty)
    size = len(raster).to_bytes(4, "big")
    check = zlib.crc32(b"IDAT" + raster).to_bytes(4, "big")
    return head[:-8] + size + b"IDAT" + raster + check + tail[4:]


DAMAGED = "is damaged: its pixels end early or cannot be decoded"
REJECTED: list[tuple[str, Callable[[], Any], str]] = [
    *(
        (
            f"image truncated to half ({kind})",
            lambda kind=kind: (data := encoded(IMAGE, kind))[: len(data) // 2],
            DAMAGED if kind != "WEBP" else "is a damaged WEBP file",
        )
        for kind in FORMATS
    ),
    *(
        (
            "image header only (24 bytes)",
            lambda kind=kind: encoded(IMAGE, kind)[:24],
            f"is a damaged {kind} file; save it again",
        )
        for kind in FORMATS
    ),
    *(
        ("TIFF/BMP missing last byte", lambda kind=kind: encoded(IMAGE, kind)[:-1], DAMAGED)
        for kind in ("TIFF", "BMP")
    ),
    *(
        (
            "bit flip in the middle: PNG/GIF broken data stream",
            lambda kind=kind: flipped(data := encoded(IMAGE, kind), len(data) // 2),
            DAMAGED,
        )
        for kind in ("PNG", "GIF")
    ),
    (
        "video sent as image",
        lambda: encoded_video(2),
        r"image 1 is a video \(video/mp4\); give it as video, not image",
    ),
    ("PNG with wrong CRC", lambda: flipped(encoded(IMAGE), 30), "is a damaged PNG file"),
    ("empty bytes", lambda: b"", r"image 1 is empty \(0 bytes\)"),
    (
        "HTML 404 page or JSON instead of image",
        lambda: b"<!doctype html><title>404</title>",
        "is text/html, not a supported image",
    ),
    (
        "HTML 404 page or JSON instead of image",
        lambda: b'{"error": "not found"}',
        "is application/json, not a supported image",
    ),
    *(
        ("SVG / HEIC / PDF / EPS / JPEG2000 / PSD", lambda head=head: head + bytes(64), text)
        for head, text in (
            (b"<svg xmlns='http://www.w3.org/2000/svg'>", r"is image/svg\+xml, not a supported"),
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is image/heic, not a supported image"),
            (b"%PDF-1.4\n", "is application/pdf, not a supported image"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is application/postscript, not a supported"),
            (b"\0\0\0\x0cjP  \r\n\x87\n", "is image/jp2, not a supported image"),
            (b"8BPS\0\1", r"photoshop, not a supported image; supported are JPEG, PNG, GIF"),
        )
    ),
    (
        "decompression bomb header 30000x30000",
        lambda: png_header(30000, 30000),
        "has 900,000,000 pixels, limit is 100,000,000; resize it first",
    ),
    (
        "real bomb 12000x12000 zeros PNG (420 KB, 432 MB raw)",
        real_bomb,
        "is 12000 x 12000 = 144,000,000 pixels, limit is 100,000,000",
    ),
    ("PNG width 2^31-1", lambda: png_header(2**31 - 1, 1), "pixels, limit is 100,000,000"),
    ("image with zero width or height", lambda: png_header(0, 10), "is a damaged PNG file"),
    ("image with zero width or height", lambda: png_header(10, 0), "is a damaged PNG file"),
    (
        "image of height 1 (1x499) or height 3 (3x22)",
        lambda: Image.new("RGB", (499, 1)),
        "499 x 1 has aspect ratio 499, limit 200; crop it or resize it first",
    ),
    (
        "aspect ratio exactly 200 / just above 200",
        lambda: Image.new("RGB", (2801, 14)),
        r"2801 x 14 has aspect ratio 200.07143, limit 200; crop it",
    ),
    (
        "1x100000 image",
        lambda: encoded(Image.new("1", (100_000, 1))),
        r"100000 x 1 has aspect ratio 1e\+05, limit 200",
    ),
    (
        "float TIFF",
        lambda: encoded(np.full((9, 9), 4000, np.float32), "TIFF"),
        "float32 values from 4000.0 to 4000.0 are not colors",
    ),
    (
        "4-channel or 2-channel numpy array, CHW/HWC ambiguous",
        lambda: np.zeros((224, 224, 2), np.uint8),
        r"array of shape \(224, 224, 2\) is not an image",
    ),
    (
        "4-channel or 2-channel numpy array, CHW/HWC ambiguous",
        lambda: np.zeros((3, 224, 3), np.uint8),
        "could have its channels first or last",
    ),
]


@pytest.mark.parametrize(
    ("make", "text"), [row[1:] for row in REJECTED], ids=[r[0] for r in REJECTED]
)
def test_rejected(make: Callable[[], Any], text: str) -> None:
    assert re.search(text, error_text(make()))


def same_pixels(source: Any, expected: Any) -> bool:
    return bool(np.array_equal(model_pixels(source), model_pixels(expected)))


def applies_orientation(orientation: int) -> bool:
    """Return whether a lossless file with the EXIF tag equals one transposed beforehand."""
    transposed = {
        2: IMAGE[:, ::-1],
        3: IMAGE[::-1, ::-1],
        4: IMAGE[::-1],
        5: IMAGE.swapaxes(0, 1),
        6: np.rot90(IMAGE, -1),
        7: IMAGE[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(IMAGE),
    }[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    return same_pixels(encoded(IMAGE, "PNG", exif=exif.tobytes()), encoded(transposed))


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif.tobytes()


def is_gray(source: Any, level: int) -> bool:
    return bool((model_pixels(source) == level).all())


def bit_flips_are_decoded_or_rejected(kind: str) -> bool:
    """Many bit flips are undetectable; the others are rejected as damage."""
    data = encoded(noise(60, 80), kind)
    errors = []
    offsets = range(len(data) // 3, len(data) * 2 // 3, len(data) // 60)
    for offset in offsets:
        try:
            model_pixels(flipped(data, offset))
        except InputError as error:
            errors.append(str(error))
    return len(errors) < len(offsets) and all("is damaged" in text for text in errors)


def on_white(source: Image.Image | bytes | np.ndarray) -> bool:
    """Return whether transparent pixels are white and opaque ones unchanged."""
    pixels = model_pixels(source)
    return bool((pixels[:, 30:] == 255).all() and (pixels[:, :25] < 10).all())


def half_transparent(mode: str) -> Image.Image:
    """Return 56 x 56 pixels, opaque black at the left, transparent black at the right."""
    image = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 28, 56))
    return image.convert(mode)


def color_keyed(mode: str, key: Any) -> bytes:
    image = Image.new(mode, (56, 56), 0)
    image.paste(key, (28, 0, 56, 56))
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    return encoded(image, "PNG", transparency=key)


ACCEPTED: list[tuple[str, Callable[[], bool]]] = [
    *(
        (
            "JPEG, PNG or GIF missing last byte",
            lambda kind=kind: same_pixels((data := encoded(IMAGE, kind))[:-1], data),
        )
        for kind in ("JPEG", "PNG", "GIF")
    ),
    *(
        (
            "bit flip in the middle, JPEG/WEBP/TIFF",
            lambda kind=kind: bit_flips_are_decoded_or_rejected(kind),
        )
        for kind in ("JPEG", "WEBP", "TIFF")
    ),
    (
        "PNG with trailing garbage / JPEG+JPEG polyglot",
        lambda: same_pixels(encoded(IMAGE) + b"garbage" * 99, encoded(IMAGE)),
    ),
    (
        "PNG with trailing garbage / JPEG+JPEG polyglot",
        lambda: same_pixels(
            encoded(IMAGE, "JPEG") + encoded(noise(50, 50), "JPEG"), encoded(IMAGE, "JPEG")
        ),
    ),
    (
        "declared mime differs from content",
        lambda: same_pixels(data_url("image/png", encoded(IMAGE, "GIF")), encoded(IMAGE, "GIF")),
    ),
    ("PNG with 50 MB compressed text chunk", lambda: same_pixels(text_bomb(), encoded(IMAGE))),
    ("1x1 pixel image", lambda: model_pixels(Image.new("RGB", (1, 1), "red")).shape == (56, 56, 3)),
    ("1x1 pixel image", lambda: model_pixels(np.zeros((1, 1, 3), np.uint8)).shape == (56, 56, 3)),
    (
        "image of height 1 (1x499) or height 3 (3x22)",
        lambda: model_pixels(Image.new("RGB", (22, 3))).shape == (28, 168, 3),
    ),
    (
        "image of height 1 (1x499) or height 3 (3x22)",
        lambda: open_image(Image.new("RGB", (499, 1)), DEFAULT_LIMITS, "x")[0].size == (499, 1),
    ),
    (
        "image smaller than 28 px on a side",
        lambda: model_pixels(noise(27, 257)).shape == (28, 252, 3),
    ),
    (
        "aspect ratio exactly 200 / just above 200",
        lambda: model_pixels(Image.new("RGB", (2800, 14))).shape[0] == 28,
    ),
    (
        "31x639 with max_pixels=20*784",
        lambda: image(noise(31, 639), max_pixels=20 * 784).num_tokens == 20,
    ),
    *(("EXIF orientation 2..8", lambda tag=tag: applies_orientation(tag)) for tag in range(2, 9)),
    *(
        (
            "EXIF garbage or orientation 99",
            lambda kind=kind, exif=exif: same_pixels(
                encoded(IMAGE, kind, exif=exif), encoded(IMAGE, kind)
            ),
        )
        for kind in ("JPEG", "PNG", "WEBP")
        for exif in (exif_of(99), exif_of(0), b"Exif\0\0" + b"\xff" * 200)
    ),
    (
        "CMYK JPEG",
        lambda: bool(
            np.abs(
                model_pixels(encoded(Image.new("CMYK", (56, 56), (0, 255, 255, 0)), "JPEG")).mean(
                    (0, 1)
                )
                - (255, 0, 0)
            ).max()
            < 6
        ),
    ),
    *(
        (
            "16-bit grayscale PNG/TIFF",
            lambda kind=kind: is_gray(encoded(np.full((56, 56), 32768, np.uint16), kind), 128),
        )
        for kind in ("PNG", "TIFF")
    ),
    (
        "float TIFF",
        lambda: is_gray(encoded(np.full((56, 56), 0.5, np.float32), "TIFF"), 128),
    ),
    ("palette image with transparency, RGB+tRNS, LA, RGBA", lambda: on_white(color_keyed("P", 1))),
    (
        "palette image with transparency, RGB+tRNS, LA, RGBA",
        lambda: on_white(color_keyed("RGB", (9, 9, 9))),
    ),
    ("palette image with transparency, RGB+tRNS, LA, RGBA", lambda: on_white(color_keyed("L", 9))),
    (
        "palette image with transparency, RGB+tRNS, LA, RGBA",
        lambda: on_white(half_transparent("LA")),
    ),
    (
        "palette image with transparency, RGB+tRNS, LA, RGBA",
        lambda: on_white(half_transparent("RGBA")),
    ),
    (
        "4-channel or 2-channel numpy array, CHW/HWC ambiguous",
        lambda: on_white(np.asarray(half_transparent("RGBA"))),
    ),
    ("1-bit and L images", lambda: is_gray(Image.new("1", (56, 56), 1), 255)),
    ("1-bit and L images", lambda: is_gray(Image.new("L", (56, 56), 77), 77)),
    *(
        (
            "animated GIF / WebP / APNG / multi-page TIFF as image",
            lambda kind=kind: bool((model_pixels(animation(kind)) < 5).all()),
        )
        for kind in ("GIF", "WEBP", "PNG", "TIFF")
    ),
    (
        "broken ICC profile",
        lambda: same_pixels(encoded(IMAGE, "JPEG", icc_profile=bytes(500)), encoded(IMAGE, "JPEG")),
    ),
]


@pytest.mark.parametrize("holds", [row[1] for row in ACCEPTED], ids=[r[0] for r in ACCEPTED])
def test_accepted(holds: Callable[[], bool]) -> None:
    assert holds()


@pytest.mark.parametrize(
    ("source", "note"),
    [
        pytest.param(
            data_url("image/png", encoded(IMAGE, "GIF")),
            "declared as image/png, read as image/gif",
            id="declared mime differs from content",
        ),
        pytest.param(
            animation("GIF"),
            "first of 4 frames",
            id="animated GIF / WebP / APNG / multi-page TIFF as image",
        ),
        pytest.param(
            half_transparent("RGBA"),
            "transparency composited on white",
            id="palette image with transparency, RGB+tRNS, LA, RGBA",
        ),
    ],
)
def test_adjustments_are_noted(source: Any, note: str) -> None:
    assert image(source).notes == (note,)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"min_pixels": 50_176, "max_pixels": 12_544},
            "min_pixels 50176 is greater than max_pixels",
        ),
        ({"min_pixels": -5}, "min_pixels is -5, must lie between 1 and"),
        ({"max_pixels": 10**15}, "max_pixels is 1000000000000000, must lie between 1 and"),
    ],
    ids=["min_pixels > max_pixels, negative or huge pixel options"] * 3,
)
def test_bad_options_are_rejected(options: dict[str, int], text: str) -> None:
    assert text in error_text(IMAGE, **options)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: png_header(30000, 30000), id="decompression bomb header 30000x30000"),
        pytest.param(real_bomb, id="real bomb 12000x12000 zeros PNG (420 KB, 432 MB raw)"),
        pytest.param(lambda: encoded(Image.new("1", (100_000, 1))), id="1x100000 image"),
    ],
)
def test_decompression_bombs_are_rejected_by_their_header(make: Callable[[], bytes]) -> None:
    data = make()
    unit = 1024 if sys.platform != "darwin" else 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        error_text(data)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 32 * 2**20
