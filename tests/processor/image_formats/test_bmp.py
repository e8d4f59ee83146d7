"""BMP: every header, depth, mask and run-length code."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from qwen2vl.errors import InputError
from tests.processor.image_formats.bmp_files import BITFIELDS, RLE4, RLE8, bmp
from tests.processor.image_formats.reference import (
    Case,
    differences_from_imagemagick,
    is_close,
    open_rgb,
    rgb_of,
    samples,
)
from tests.requirements import needs_imagemagick

PALETTE = np.random.default_rng(2).integers(0, 256, (256, 3))
COLORS = samples(8, 4)
RGB = COLORS[..., :3]
STORED = COLORS[..., 0] << 16 | COLORS[..., 1] << 8 | COLORS[..., 2]
WITH_ALPHA = STORED | COLORS[..., 3] << 24
BGRA = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
RGBA = (0xFF, 0xFF00, 0xFF0000, 0xFF000000)
ON_WHITE = rgb_of(RGB / 255, COLORS[..., 3:] / 255)


def masked(values: np.ndarray, masks: tuple[int, ...]) -> np.ndarray:
    """Return the pixels of values with masks of red, green, blue and alpha, on white."""
    channels = [
        ((values & mask) >> (mask & -mask).bit_length() - 1)
        / (mask >> (mask & -mask).bit_length() - 1)
        for mask in masks
    ]
    alpha = channels[3][..., None] if len(masks) > 3 else 1.0
    return rgb_of(np.stack(channels[:3], 2), alpha)


def run_lengths(indices: np.ndarray, bits: int) -> bytes:
    """Encode rows by runs of one or two pixels."""
    data = b""
    for row in indices[::-1].tolist():
        if bits == 8:
            data += b"".join(bytes([1, index]) for index in row) + b"\0\0"
        else:
            pairs = zip(row[::2], row[1::2], strict=True)
            data += b"".join(bytes([2, a << 4 | b]) for a, b in pairs) + b"\0\0"
    return data + b"\0\1"


def cases() -> Iterator[tuple[str, Case]]:
    for bits in (1, 4, 8):
        indices = samples(bits, 1)[..., 0]
        palette = PALETTE[: 1 << bits]
        for header in (12, 40, 64, 108, 124):
            data = bmp(indices, bits=bits, header=header, palette=palette)
            yield f"{bits} bit, header {header}", Case(data, palette[indices])
        few = indices % min(3, 1 << bits)
        data = bmp(few, bits=bits, palette=palette[:3])
        yield f"{bits} bit, few colors", Case(data, palette[few])
    inverted = np.array([[255] * 3, [0] * 3])
    bits_1 = samples(1, 1)[..., 0]
    yield "1 bit, white first", Case(bmp(bits_1, bits=1, palette=inverted), inverted[bits_1])
    for header in (12, 40, 64, 124):
        yield f"24 bit, header {header}", Case(bmp(STORED, bits=24, header=header), RGB)
    yield "24 bit, top down", Case(bmp(STORED, bits=24, top_down=True), RGB)
    for header in (40, 52, 56, 108, 124):
        yield f"32 bit, header {header}", Case(bmp(STORED, bits=32, header=header), RGB)
    for header in (56, 108, 124):
        for name, masks in (("BGRA", BGRA), ("RGBA", RGBA), ("ARGB", (*BGRA[1:], BGRA[0]))):
            options = {"bits": 32, "header": header, "compression": BITFIELDS, "masks": masks}
            data = bmp(WITH_ALPHA, **options)
            yield f"32 bit, {name}, header {header}", Case(data, masked(WITH_ALPHA, masks))
    for name, bits, masks in (
        ("555", 16, (0x7C00, 0x3E0, 0x1F)),
        ("565", 16, (0xF800, 0x7E0, 0x1F)),
        ("888", 32, (0xFF0000, 0xFF00, 0xFF)),
        ("BGR", 32, (0xFF, 0xFF00, 0xFF0000)),
        ("101010", 32, (0x3FF00000, 0xFFC00, 0x3FF)),
        ("4444", 16, (0xF00, 0xF0, 0xF, 0xF000)),
        ("1555", 16, (0x7C00, 0x3E0, 0x1F, 0x8000)),
    ):
        values = STORED & (1 << bits) - 1
        options = {"bits": bits, "compression": BITFIELDS, "masks": masks}
        for header, top_down in ((40 if len(masks) == 3 else 56, False), (124, True)):
            data = bmp(values, header=header, top_down=top_down, **options)
            yield f"masks {name}, header {header}", Case(data, masked(values, masks))
    yield "16 bit", Case(bmp(STORED & 0x7FFF, bits=16), masked(STORED, (0x7C00, 0x3E0, 0x1F)))
    for bits, code in ((8, RLE8), (4, RLE4)):
        indices = samples(bits, 1)[..., 0]
        options = {"bits": bits, "palette": PALETTE[: 1 << bits], "compression": code}
        data = bmp(indices, data=run_lengths(indices, bits), **options)
        yield f"run lengths, {bits} bit", Case(data, PALETTE[indices])
    yield from partial_runs()


def partial_runs() -> Iterator[tuple[str, Case]]:
    """Yield files that move, store pixels as they are, and end early: the rest has index 0."""
    indices = np.zeros((14, 22), int)
    indices[-1, :5] = 1
    indices[-2, 3:7] = (7, 8, 9, 7)
    indices[-4, 5:9] = 2
    runs = b"\5\1\0\0\0\2\3\0\0\4\7\x08\x09\7\0\0\0\2\5\1\4\2\0\1"
    data = bmp(indices, bits=8, palette=PALETTE, compression=RLE8, data=runs)
    yield "run lengths, 8 bit, partial", Case(data, PALETTE[indices])
    runs = b"\5\x11\0\0\0\2\3\0\0\4\x78\x97\0\0\0\2\5\1\4\x22\0\1"
    data = bmp(indices, bits=4, palette=PALETTE[:16], compression=RLE4, data=runs)
    yield "run lengths, 4 bit, partial", Case(data, PALETTE[indices])


CASES = dict(cases())
# ImageMagick leaves white of 4 bit at 240 and alpha of 1 bit at a half, reads palettes of a header
# of 64 bytes as 3 bytes a color, and reports run lengths that end early as an error.
OTHERWISE = ("masks 4444", "masks 1555", "1 bit, header 64", "4 bit, header 64", "8 bit, header 64")


@pytest.mark.parametrize("name", CASES)
def test_every_header_depth_and_mask(name: str) -> None:
    assert is_close(open_rgb(CASES[name].data)[0], CASES[name].pixels)


@needs_imagemagick
def test_pixels_equal_imagemagick() -> None:
    files = {
        name: case.data
        for name, case in CASES.items()
        if not name.startswith(OTHERWISE) and not name.endswith("partial")
    }
    assert differences_from_imagemagick(files, "bmp") == []


@pytest.mark.parametrize("masks", [BGRA, RGBA, (*BGRA[1:], BGRA[0])])
def test_alpha_of_0_everywhere_is_opaque(masks: tuple[int, ...]) -> None:
    """As browsers show it; ImageMagick makes it white."""
    alpha = np.int64(masks[3])
    values = WITH_ALPHA & ~alpha
    data = bmp(values, bits=32, header=124, compression=BITFIELDS, masks=masks)
    pixels, notes = open_rgb(data)
    assert is_close(pixels, masked(values, masks[:3]))
    assert notes == ()


def test_the_fourth_byte_without_a_mask_is_no_alpha() -> None:
    """As in browsers; ImageMagick takes it for alpha."""
    for header in (40, 124):
        pixels, notes = open_rgb(bmp(WITH_ALPHA, bits=32, header=header))
        np.testing.assert_array_equal(pixels, RGB)
        assert notes == ()


@pytest.mark.parametrize("runs", [b"\1\1" * 3_000_000, b"\0\2\0\0" * 1_500_000])
def test_codes_that_draw_nothing_end(runs: bytes) -> None:
    """Runs behind the end of a row, and moves to the same place: 6 MB for 308 pixels."""
    data = bmp(np.zeros((14, 22), int), bits=8, palette=PALETTE, compression=RLE8, data=runs)
    began = time.process_time()
    with pytest.raises(InputError, match="image 1 is damaged: its pixels end early"):
        open_rgb(data)
    assert time.process_time() - began < 0.3


def test_a_run_may_be_longer_than_its_row() -> None:
    """Padded to an even number of pixels."""
    indices = np.full((2, 5), 3)
    options = {"bits": 8, "palette": PALETTE, "compression": RLE8}
    data = bmp(indices, data=b"\6\3\0\0\6\3\0\1", **options)
    np.testing.assert_array_equal(open_rgb(data)[0], PALETTE[indices])


@pytest.mark.parametrize("cut", [60, 200])
def test_files_that_end_early_are_damaged(cut: int) -> None:
    masks = (0xF00, 0xF0, 0xF, 0xF000)
    options = {"bits": 16, "header": 56, "compression": BITFIELDS, "masks": masks}
    with pytest.raises(InputError, match="image 1 is damaged: its pixels end early"):
        open_rgb(bmp(STORED & 0xFFFF, **options)[:-cut])
    runs = CASES["run lengths, 8 bit"].data
    with pytest.raises(InputError, match="image 1 is damaged: its pixels end early"):
        open_rgb(runs[:-cut])
