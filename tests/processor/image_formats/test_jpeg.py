"""JPEG: CMYK and YCCK, colors without a transform, refused kinds, files without their end."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen2vl.errors import InputError
from qwen2vl.processor.image_formats.jpeg import has_many_scans, unsupported_kind
from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import DEFAULT_LIMITS
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


def pixels_without_end(data: bytes) -> np.ndarray:
    pixels, notes = open_rgb(data)
    assert notes == ("the end marker of the JPEG is missing, but no pixels are",)
    return pixels


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_file_that_lacks_its_end_marker_alone_is_read(mode: str, subsampling: int) -> None:
    """Not a bit more may be missing, wherever the file is cut: blocks outside of the image, too."""
    image = Image.fromarray(smooth(40, 56)).convert(mode)
    data = encoded(image, "JPEG", quality=90, subsampling=subsampling)
    whole, _ = open_rgb(data)
    for count in (1, 2):
        np.testing.assert_array_equal(pixels_without_end(data[:-count]), whole)
    for count in range(3, 120):
        with pytest.raises(InputError, match="is damaged: its pixels end early"):
            open_rgb(data[:-count])


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 1}])
def test_files_of_which_parts_may_be_missing_are_refused(options: dict[str, int]) -> None:
    data = encoded(smooth(40, 56), "JPEG", **options)
    parts = [data.rindex(b"\xff\xda") if "progressive" in options else data.rindex(b"\xff\xd1")]
    for stop in (*parts, len(data) - 2):
        with pytest.raises(InputError, match="is damaged: its pixels end early"):
            open_rgb(data[:stop])


def test_orientation_of_a_file_without_end_marker() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(IMAGE, "JPEG", exif=exif.tobytes())
    np.testing.assert_array_equal(open_rgb(data[:-2])[0], open_rgb(data)[0])


def test_scans_of_local_files_are_counted(tmp_path: Path) -> None:
    data = encoded(IMAGE, "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    path = tmp_path / "many.jpg"
    path.write_bytes(data[:start] + data[start:-2] * 101 + data[-2:])
    for source in (path, path.read_bytes()):
        with pytest.raises(InputError, match="x is a JPEG of more than 100 scans, which is the"):
            open_image(source, DEFAULT_LIMITS, "x")
