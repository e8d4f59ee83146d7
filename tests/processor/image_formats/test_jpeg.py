"""JPEG: CMYK and YCCK, colors without a transform, and the kinds that are refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from qwen2vl.errors import InputError
from qwen2vl.processor.image_formats.jpeg import has_many_scans, unsupported_kind
from tests.media import encoded, smooth
from tests.processor.image_formats.reference import differences_from_imagemagick, open_rgb
from tests.requirements import needs_imagemagick

IMAGE = Image.fromarray(smooth(32, 48))
FILES = {
    **{mode: encoded(IMAGE.convert(mode), "JPEG", quality=95) for mode in ("RGB", "L", "CMYK")},
    "RGB without a transform": encoded(IMAGE, "JPEG", quality=95, keep_rgb=True),
    "progressive": encoded(IMAGE, "JPEG", quality=95, progressive=True, subsampling=0),
}


def adobe(transform: int) -> bytes:
    """Return a CMYK JPEG whose Adobe marker names another transform: 2 is YCCK."""
    data = FILES["CMYK"]
    start = data.index(b"Adobe") + 11
    return data[:start] + bytes([transform]) + data[start + 1 :]


def with_frame(code: int, precision: int = 8) -> bytes:
    """Return a JPEG whose frame header has another marker and precision."""
    data = FILES["RGB"]
    start = data.index(b"\xff\xc0")
    return (
        data[: start + 1]
        + bytes([code])
        + data[start + 2 : start + 4]
        + bytes([precision])
        + data[start + 5 :]
    )


def test_ycck_is_converted_and_inverted() -> None:
    with Image.open(io.BytesIO(FILES["CMYK"])) as image:
        stored = np.asarray(image).astype(float)  # Pillow has inverted it: Y, Cb, Cr, K
    luma, cb, cr = np.moveaxis(255 - stored[..., :3], 2, 0)
    cb, cr = cb - 128, cr - 128
    ink = np.clip(
        np.stack((luma + 1.402 * cr, luma - 0.344 * cb - 0.714 * cr, luma + 1.772 * cb), 2), 0, 255
    )
    expected = 255 * (1 - ink / 255) * (1 - stored[..., 3:] / 255)
    found, _ = open_rgb(adobe(2))
    assert np.abs(found - expected).max() <= 2  # of the conversions of libjpeg and Pillow


@needs_imagemagick
def test_pixels_equal_imagemagick() -> None:
    assert differences_from_imagemagick({**FILES, "YCCK": adobe(2)}, "jpg") == []


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (with_frame(0xC1, 12), "image 1 is a JPEG of 12 bits a sample, which is not read; save it"),
        (with_frame(0xC3), "image 1 is a lossless JPEG, which is not read; save it as baseline"),
        (with_frame(0xC5), "image 1 is a hierarchical JPEG, which is not read"),
    ],
)
def test_other_kinds_are_refused_by_name(data: bytes, text: str) -> None:
    with pytest.raises(InputError, match=text):
        open_rgb(data)


def test_usual_files_are_not_refused() -> None:
    for data in FILES.values():
        assert unsupported_kind(data) == ""
        assert not has_many_scans(data)
    assert unsupported_kind(FILES["RGB"][:30]) == ""


def test_a_thumbnail_in_exif_data_is_no_frame_header() -> None:
    exif = Image.Exif()
    exif[0x9286] = with_frame(0xC3)  # a comment that holds a lossless JPEG
    assert unsupported_kind(encoded(IMAGE, "JPEG", exif=exif.tobytes())) == ""
