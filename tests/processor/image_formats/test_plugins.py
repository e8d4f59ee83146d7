"""Opening and loading: the header comes first; GIF, WebP and AVIF with transparency."""

from __future__ import annotations

import io
import struct

import av
import numpy as np
import pytest
from PIL import Image, ImageFile

from qwen2vl.errors import InputError
from qwen2vl.processor.image_formats.formats import IMAGE_FORMATS
from qwen2vl.processor.image_formats.plugins import load_pixels, open_format
from qwen2vl.processor.media.rgb import decode_media, open_encoded, oriented_size
from qwen2vl.processor.media.sniff import sniff_type
from qwen2vl.processor.media.source import DEFAULT_LIMITS, Media
from tests.media import encoded, smooth
from tests.processor.image_formats.bmp_files import BITFIELDS, bmp
from tests.processor.image_formats.png_files import png
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
PALETTED = IMAGE.quantize(16)
WITH_ALPHA = samples(8, 4)
NOTE = ("transparency composited on white",)


def small_frame(**options: int) -> bytes:
    """Return a GIF whose only frame covers 10 x 6 pixels of the canvas, at (4, 3)."""
    data = bytearray(encoded(PALETTED.crop((4, 3, 14, 9)), "GIF", **options))
    data[6:10] = struct.pack("<HH", WIDTH, HEIGHT)
    start = data.index(b"\x2c", 13 + 3 * (2 << (data[10] & 7)))
    data[start + 1 : start + 5] = struct.pack("<HH", 4, 3)
    return bytes(data)


@pytest.mark.parametrize("options", [{}, {"transparency": 3}])
def test_what_a_gif_frame_leaves_free_is_white(options: dict[str, int]) -> None:
    pixels, notes = open_rgb(small_frame(**options))
    inside = np.asarray(PALETTED.convert("RGB")).copy()
    inside[np.asarray(PALETTED) == options.get("transparency", -1)] = 255
    expected = np.full((HEIGHT, WIDTH, 3), 255)
    expected[3:9, 4:14] = inside[3:9, 4:14]
    np.testing.assert_array_equal(pixels, expected)
    assert notes == NOTE


def test_webp_with_alpha() -> None:
    image = Image.fromarray(WITH_ALPHA.astype(np.uint8))
    pixels, notes = open_rgb(encoded(image, "WEBP", lossless=True, exact=True))
    assert is_close(pixels, rgb_of(WITH_ALPHA[..., :3] / 255, WITH_ALPHA[..., 3:] / 255))
    assert notes == NOTE


@needs_imagemagick
def test_gif_and_webp_equal_imagemagick() -> None:
    files = {
        f"GIF {options}": encoded(PALETTED, "GIF", **options)
        for options in ({}, {"transparency": 3})
    }
    files |= {"small": small_frame(), "small, transparent": small_frame(transparency=3)}
    assert differences_from_imagemagick(files, "gif") == []
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


def test_random_damage_is_decoded_or_refused() -> None:
    """Any bytes give either pixels of the size in the header, or an InputError."""
    generator = np.random.default_rng(3)
    masks = (0xF00, 0xF0, 0xF, 0xF000)
    sources = [
        tiff(samples(16, 4), photometric=2, bits=16, extra_samples=[2], planar=True),
        tiff(samples(4, 4), photometric=5, bits=4, tile=(16, 16), deflate=True),
        tiff(samples(8, 3), photometric=6, byte_order=">", tags={530: [1, 1]}, predictor=2),
        png(samples(16, 3), color_type=2, depth=16, transparency=bytes(6)),
        png(samples(16, 2), color_type=4, depth=16),
        bmp(samples(16, 1)[..., 0], bits=16, header=56, compression=BITFIELDS, masks=masks),
        b"P6 22 14 1000\n" + samples(16, 3).astype(">u2").tobytes(),
    ]
    num_errors = 0
    for source in sources:
        for _ in range(60):
            data = np.frombuffer(source, np.uint8).copy()
            # Mostly headers, which a TIFF has at its end.
            starts = (0, max(0, len(data) - 250), int(generator.integers(len(data))))
            first = int(generator.choice(starts))
            places = (first + generator.integers(0, 250, 3)) % len(data)
            data[places] = generator.integers(0, 256, 3)
            try:
                media = Media(content=data.tobytes())
                with open_encoded(media, DEFAULT_LIMITS, "x") as (image, _):
                    size = oriented_size(image)
                decoded = decode_media(media, DEFAULT_LIMITS, "x").image
                assert size == (decoded.height, decoded.width)
            except InputError:
                num_errors += 1
    assert 100 < num_errors < 60 * len(sources)
