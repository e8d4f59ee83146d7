"""EXIF orientation: header size = decoded size = the size that boxes refer to, in every format."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.formats import Conversation
from qwen2vl.data.preprocess import HeaderPreprocessor, SamplePreprocessor
from qwen2vl.processor.media.rgb import decode_media, open_encoded, oriented_size
from qwen2vl.processor.media.source import DEFAULT_LIMITS, Media
from tests.media import encoded, smooth
from tests.processor.image_formats.png_files import RGB, png
from tests.processor.image_formats.reference import imagemagick_pixels, is_close
from tests.processor.image_formats.tiff_files import tiff
from tests.requirements import needs_imagemagick
from tests.tiny import tiny_processor

STORED = smooth(32, 48)
SUFFIXES = {"JPEG": "jpg", "TIFF": "tif"}


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x112] = orientation
    return data.tobytes()


def files(orientation: int) -> Iterator[tuple[str, bytes]]:
    """Yield the picture in every format that carries an orientation, and in rare layouts."""
    yield "JPEG", encoded(STORED, "JPEG", exif=exif(orientation), quality=95, subsampling=0)
    for name in ("TIFF", "PNG"):
        yield name, encoded(STORED, name, exif=exif(orientation))
    yield "TIFF, LZW", encoded(STORED, "TIFF", exif=exif(orientation), compression="tiff_lzw")
    yield "WEBP", encoded(STORED, "WEBP", exif=exif(orientation), lossless=True)
    yield "AVIF", encoded(STORED, "AVIF", exif=exif(orientation), quality=100)
    for planar, deflate in product((False, True), repeat=2):
        layout = tiff(
            STORED.astype(int) * 257,
            photometric=2,
            bits=16,
            planar=planar,
            deflate=deflate,
            tags={274: [orientation]},
        )
        yield f"TIFF, 16 bit, {planar}, {deflate}", layout
    chunk = (b"eXIf", exif(orientation).removeprefix(b"Exif\0\0"))
    wide = STORED.astype(int) * 257
    yield "PNG, 16 bit", png(wide, color_type=RGB, depth=16, chunks=[chunk])
    yield "BMP", encoded(STORED, "BMP")  # carries none


def upright(orientation: int) -> np.ndarray:
    """Return the picture as the EXIF specification places its first row and column."""
    return {
        1: STORED,
        2: STORED[:, ::-1],
        3: STORED[::-1, ::-1],
        4: STORED[::-1],
        5: STORED.swapaxes(0, 1),
        6: np.rot90(STORED, -1),
        7: STORED[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(STORED),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("apply", [True, False])
def test_header_and_decoded_size_agree(orientation: int, apply: bool) -> None:
    for name, data in files(orientation):
        expected = upright(orientation if apply and name != "BMP" else 1)
        media = Media(content=data)
        with open_encoded(media, DEFAULT_LIMITS, name) as (image, _):
            size = oriented_size(image, apply_exif_orientation=apply)
        assert size == expected.shape[:2], name
        decoded = decode_media(media, DEFAULT_LIMITS, name, apply_exif_orientation=apply)
        assert (decoded.image.height, decoded.image.width) == size, name
        found = np.asarray(decoded.image).astype(int)
        tolerance = {"JPEG": 12, "AVIF": 12}.get(name, 1)
        assert np.abs(found - expected).max() <= tolerance, name
        applied = orientation if apply and name != "BMP" else 1
        assert decoded.orientation == applied, name
        assert decoded.notes == (("EXIF orientation applied",) if applied > 1 else ()), name


@pytest.mark.parametrize("orientation", [3, 6])
def test_images_that_a_user_opened(orientation: int) -> None:
    """Loaded or not: Pillow turns a TIFF when it loads it, and other files never."""
    expected = upright(orientation)
    for name, is_loaded in product(("JPEG", "TIFF", "PNG"), (False, True)):
        with Image.open(io.BytesIO(dict(files(orientation))[name])) as image:
            if is_loaded:
                image.load()
            assert oriented_size(image) == expected.shape[:2]
            decoded = decode_media(Media(content=image), DEFAULT_LIMITS, name).image
        assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 12, name


def test_orientation_in_xmp_alone() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    for name, options in (("JPEG", {"xmp": xmp}), ("TIFF", {"tiffinfo": {700: xmp}})):
        media = Media(content=encoded(STORED, name, **options))
        with open_encoded(media, DEFAULT_LIMITS, name) as (image, _):
            size = oriented_size(image)
        decoded = decode_media(media, DEFAULT_LIMITS, name).image
        assert size == (decoded.height, decoded.width) == (48, 32), name


@needs_imagemagick
@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_orientation_is_that_of_imagemagick(name: str) -> None:
    """ImageMagick 6 turns no PNG and no WebP."""
    turned = [dict(files(orientation))[name] for orientation in range(1, 9)]
    for data, expected in zip(turned, imagemagick_pixels(turned, SUFFIXES[name]), strict=True):
        found = decode_media(Media(content=data), DEFAULT_LIMITS, name).image
        assert is_close(np.asarray(found), expected)


@pytest.mark.parametrize("name", ["JPEG", "TIFF", "TIFF, 16 bit, True, False", "PNG", "AVIF"])
def test_a_box_trains_to_the_same_tokens_in_every_format(name: str, tmp_path: Path) -> None:
    """The row of a rotated picture has the ids of the row of the upright one, by header too."""
    (tmp_path / "rotated").write_bytes(dict(files(6))[name])
    (tmp_path / "upright").write_bytes(encoded(np.ascontiguousarray(upright(6))))
    data = DataConfig(sources=(SourceConfig(path="x"),), frame_cache_gb=0)
    ids = []
    for kind, file in product((SamplePreprocessor, HeaderPreprocessor), ("rotated", "upright")):
        preprocessor = kind(tiny_processor(), data, media_root=str(tmp_path))
        question = [{"type": "image", "image": file}, {"type": "text", "text": "Where?"}]
        box = [{"type": "ref", "ref": "it"}, {"type": "box", "box": [3, 20, 10, 40]}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": box}]
        ids.append(preprocessor.prepare(Conversation("a row", messages)).input_ids)
    assert ids[0] == ids[1] == ids[2] == ids[3]


def test_the_size_of_a_png_needs_no_pixels() -> None:
    """An eXIf chunk counts where it stands before the pixels, as in browsers."""
    data = png(STORED.astype(int), color_type=RGB)
    start = data.index(b"IDAT")
    broken = data[: start + 20] + b"\xff" * 40 + data[start + 60 :]
    with open_encoded(Media(content=broken), DEFAULT_LIMITS, "x") as (image, _):
        assert oriented_size(image) == (32, 48)
    assert struct.unpack(">I", data[16:20]) == (48,)
