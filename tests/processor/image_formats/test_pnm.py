"""PBM, PGM and PPM: plain and binary, of every largest value."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from qwen2vl.errors import InputError
from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import MediaLimits
from tests.media import encoded, smooth
from tests.processor.image_formats.pnm_files import pnm
from tests.processor.image_formats.reference import (
    HEIGHT,
    WIDTH,
    Case,
    differences_from_imagemagick,
    is_close,
    open_rgb,
    rgb_of,
)
from tests.requirements import needs_imagemagick


def cases() -> Iterator[tuple[str, Case]]:
    generator = np.random.default_rng(6)
    for kind, channels in ((2, 1), (3, 3), (5, 1), (6, 3)):
        for most in (1, 15, 100, 255, 1000, 65535):
            values = generator.integers(0, most + 1, (HEIGHT, WIDTH, channels))
            yield f"P{kind}, {most}", Case(pnm(kind, values, most), rgb_of(values / most))
        dark = generator.integers(0, 256, (HEIGHT, WIDTH, channels))
        yield f"P{kind}, 65535, dark", Case(pnm(kind, dark, 65535), rgb_of(dark / 65535))
    bits = generator.integers(0, 2, (HEIGHT, WIDTH, 1))
    for kind in (1, 4):
        yield f"P{kind}", Case(pnm(kind, bits, None), rgb_of(1.0 - bits))


CASES = dict(cases())


@pytest.mark.parametrize("name", CASES)
def test_every_kind_and_largest_value(name: str) -> None:
    pixels, notes = open_rgb(CASES[name].data)
    assert is_close(pixels, CASES[name].pixels)
    assert notes == ()


@needs_imagemagick
def test_pixels_equal_imagemagick() -> None:
    assert differences_from_imagemagick({n: c.data for n, c in CASES.items()}, "pnm") == []


def test_files_of_pillow_are_read_exactly() -> None:
    image = Image.fromarray(smooth(20, 30))
    for mode in ("RGB", "L", "1"):
        want = np.asarray(image.convert(mode).convert("RGB"))
        np.testing.assert_array_equal(open_rgb(encoded(image.convert(mode), "PPM"))[0], want)


def test_the_size_is_checked_before_the_pixels() -> None:
    with pytest.raises(InputError, match="image 1 is 60000 x 60000 = 3,600,000,000 pixels, limit"):
        open_rgb(b"P6 60000 60000 65535\n")
    with pytest.raises(InputError, match="limit is 100"):
        open_image(CASES["P6, 1000"].data, MediaLimits(max_image_pixels=100), "x")


def test_a_plain_file_is_split_in_blocks() -> None:
    """Numbers across the ends of blocks are whole; what follows the last is not split."""
    values = np.random.default_rng(5).integers(0, 1001, (400, 500, 3))
    data = pnm(3, values, 1000)
    assert len(data) > 2 << 20
    assert is_close(open_rgb(data)[0], rgb_of(values / 1000))
    began = time.process_time()
    assert open_rgb(b"P3 1 1 1000\n10 20 30 " + b"1 " * 10_000_000)[0].shape == (1, 1, 3)
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (CASES["P6, 1000"].data[:-9], "image 1 is damaged: its pixels end early"),
        (CASES["P2, 1000"].data[:-90], "image 1 is damaged: its pixels end early"),
        (CASES["P6, 255"].data[:-9], "image 1 is damaged: its pixels end early"),
        (b"P3 2 1 1000\n1 2 3 4 5 -6", "image 1 is damaged: its pixels end early"),
        (b"P3 2 1 1000\n1 2 3 4 5 x", "image 1 is damaged: its pixels end early"),
        (b"P6 2 0 255\n", "image 1 is a damaged PPM file"),
        (b"P6 2 1 70000\n123456", "image 1 is a damaged PPM file"),
        (b"P7\nWIDTH 2\nHEIGHT 1\nDEPTH 4\n", "is image/x-portable-arbitrarymap, not a supported"),
        (b"Pf\n2 1\n-1.0\n12341234", "is image/x-portable-floatmap, not a supported image"),
        (b"P6 is not a picture", "is text/plain, not a supported image"),
        (b"PyRGBA 2 1 255\n12345678", "is text/plain, not a supported image"),
    ],
)
def test_damaged_and_foreign_files_are_refused(data: bytes, text: str) -> None:
    with pytest.raises(InputError, match=text):
        open_rgb(data)
