"""Opening and loading: the header comes first; WebP and AVIF with transparency."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image, ImageFile

from qwen2vl.processor.image_formats.formats import IMAGE_FORMATS
from qwen2vl.processor.image_formats.plugins import load_pixels, open_format
from qwen2vl.processor.media.sniff import sniff_type
from tests.media import encoded, smooth
from tests.processor.image_formats.reference import (
    HEIGHT,
    WIDTH,
    differences_from_imagemagick,
    is_close,
    open_rgb,
    rgb_of,
    samples,
)
from tests.processor.image_formats.tiff_files import tiff
from tests.requirements import needs_imagemagick

IMAGE = Image.fromarray(smooth(HEIGHT, WIDTH))
WITH_ALPHA = samples(8, 4)
NOTE = ("transparency composited on white",)


def test_webp_with_alpha() -> None:
    image = Image.fromarray(WITH_ALPHA.astype(np.uint8))
    pixels, notes = open_rgb(encoded(image, "WEBP", lossless=True, exact=True))
    assert is_close(pixels, rgb_of(WITH_ALPHA[..., :3] / 255, WITH_ALPHA[..., 3:] / 255))
    assert notes == NOTE


@needs_imagemagick
def test_webp_equals_imagemagick() -> None:
    image = Image.fromarray(WITH_ALPHA.astype(np.uint8))
    files = {
        "lossless": encoded(image, "WEBP", lossless=True, exact=True),
        "lossy": encoded(IMAGE, "WEBP", quality=95),
    }
    assert differences_from_imagemagick(files, "webp") == []


def test_avif_is_read_as_it_was_written() -> None:
    """By libavif, near the original; ImageMagick 6 ignores alpha and the range of the values."""
    image = Image.fromarray(WITH_ALPHA.astype(np.uint8))
    for source in (image, IMAGE):
        data = encoded(source, "AVIF", quality=100, subsampling="4:4:4")
        pixels, notes = open_rgb(data)
        whole = np.asarray(source).astype(float)
        alpha = whole[..., 3:] / 255 if whole.shape[2] == 4 else 1.0
        expected = rgb_of(whole[..., :3] / 255, alpha)
        assert np.abs(pixels - expected).max() < 6
        assert notes == (NOTE if source is image else ())


def test_avif_of_10_bit() -> None:
    picture, file = smooth(64, 96), io.BytesIO()
    with av.open(file, "w", format="avif") as output:
        stream = output.add_stream("libsvtav1", rate=1, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        output.mux(stream.encode(frame.reformat(format="yuv420p10le")))
        output.mux(stream.encode(None))
    pixels, notes = open_rgb(file.getvalue())
    assert np.abs(pixels.astype(int) - picture).max() <= 10
    assert notes == ()


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_the_header_is_read_without_the_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(IMAGE, name)

    def refuse(*_: object) -> None:
        raise AssertionError("pixels are decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    image = open_format(io.BytesIO(data), sniff_type(data[:256]), IMAGE_FORMATS)
    assert image.size == (WIDTH, HEIGHT)
    monkeypatch.undo()
    assert load_pixels(image).size == (WIDTH, HEIGHT)


def test_the_header_of_a_tiff_that_pillow_cannot_unpack() -> None:
    data = tiff(samples(16, 2), photometric=1, bits=16, extra_samples=[2], planar=True)
    image = open_format(io.BytesIO(data[:8] + bytes(900) + data[908:]), "image/tiff", ("TIFF",))
    assert image.size == (WIDTH, HEIGHT)
