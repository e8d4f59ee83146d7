"""PNG: every pair of color type and depth, with and without transparency, on white."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from qwen2vl.errors import InputError
from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import DEFAULT_LIMITS
from qwen2vl.processor.media.video_source import open_video
from tests.media import encoded, frames_of, smooth
from tests.processor.image_formats.png_files import (
    DEPTHS,
    GRAY,
    GRAY_ALPHA,
    PALETTE,
    RGB,
    RGB_ALPHA,
    png,
)
from tests.processor.image_formats.reference import (
    HEIGHT,
    WIDTH,
    Case,
    differences_from_imagemagick,
    fractions,
    is_close,
    open_rgb,
    rgb_of,
    samples,
)
from tests.requirements import needs_imagemagick

NUM_CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGB_ALPHA: 4}
NOTE = ("transparency composited on white",)


def colors_of(values: np.ndarray, color_type: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Return colors and alpha as fractions."""
    found = fractions(values, depth)
    if color_type in (GRAY_ALPHA, RGB_ALPHA):
        return found[..., :-1], found[..., -1:]
    return found, np.ones((*values.shape[:2], 1))


def cases() -> Iterator[tuple[str, Case]]:
    generator = np.random.default_rng(4)
    for color_type, depths in DEPTHS.items():
        for depth in depths:
            values = samples(depth, NUM_CHANNELS[color_type])
            name = f"type {color_type}, {depth} bit"
            options: dict[str, Any] = {"color_type": color_type}
            if color_type == PALETTE:
                palette = generator.integers(0, 256, (1 << depth, 3))
                alpha = generator.integers(0, 256, 1 << max(0, depth - 1), dtype=np.uint8)
                data = png(values, depth=depth, palette=palette, **options)
                colors = palette[values[..., 0]] / 255
                yield name, Case(data, rgb_of(colors))
                whole = np.append(alpha, np.full((1 << depth) - len(alpha), 255, np.uint8))
                data = png(
                    values, depth=depth, palette=palette, transparency=alpha.tobytes(), **options
                )
                yield f"{name}, tRNS", Case(data, rgb_of(colors, whole[values] / 255))
                continue
            colors, opacity = colors_of(values, color_type, depth)
            yield name, Case(png(values, depth=depth, **options), rgb_of(colors, opacity))
            if color_type in (GRAY, RGB):
                key = values[3, 5]
                data = png(values, depth=depth, transparency=key.astype(">u2").tobytes(), **options)
                opacity = 1.0 - (values == key).all(2, keepdims=True)
                assert 0 < opacity.mean() < 1
                yield f"{name}, tRNS", Case(data, rgb_of(colors, opacity))


CASES = dict(cases())


@pytest.mark.parametrize("name", CASES)
def test_every_color_type_and_depth(name: str) -> None:
    pixels, notes = open_rgb(CASES[name].data)
    assert is_close(pixels, CASES[name].pixels)
    is_transparent = "tRNS" in name or name.startswith(("type 4", "type 6"))
    assert (NOTE[0] in notes) == is_transparent


def test_16_bit_colors_are_rounded_as_arrays_are() -> None:
    """Pillow takes the high byte: 0x00FF becomes 0."""
    values = samples(16, 3)
    np.testing.assert_array_equal(
        open_rgb(png(values, color_type=RGB, depth=16))[0], (values + 128) // 257
    )


def test_a_transparent_color_has_to_match_in_all_bits() -> None:
    values = np.full((5, 6, 3), 0x1234)
    values[0, 0] = 0x1235  # the same high bytes
    key = np.array([0x1234] * 3, ">u2").tobytes()
    for color_type, count in ((RGB, 3), (GRAY, 1)):
        data = png(
            values[..., :count], color_type=color_type, depth=16, transparency=key[: 2 * count]
        )
        pixels, _ = open_rgb(data)
        assert (pixels[0, 0] == 0x12).all()
        assert (pixels.reshape(-1, 3)[1:] == 255).all()


@needs_imagemagick
def test_pixels_equal_imagemagick() -> None:
    gamma = (b"gAMA", struct.pack(">I", 100_000))
    files = {name: case.data for name, case in CASES.items()}
    files["gamma"] = png(samples(8, 3), color_type=RGB, chunks=[gamma])
    assert differences_from_imagemagick(files, "png") == []


@pytest.mark.parametrize("color_type", [GRAY, RGB, GRAY_ALPHA, RGB_ALPHA])
def test_interlaced_files_of_16_bit(color_type: int) -> None:
    values = samples(16, NUM_CHANNELS[color_type])
    data = png(values, color_type=color_type, depth=16, interlaced=True)
    assert is_close(open_rgb(data)[0], rgb_of(*colors_of(values, color_type, 16)))


def test_an_image_that_a_user_opened_is_corrected() -> None:
    for name in ("type 0, 16 bit, tRNS", "type 2, 16 bit, tRNS", "type 4, 16 bit"):
        with Image.open(io.BytesIO(CASES[name].data)) as image:
            found = open_image(image, DEFAULT_LIMITS, "x").image
        assert is_close(np.asarray(found), CASES[name].pixels)


def test_a_palette_with_alpha_in_memory() -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([255, 0, 0, 0, 9, 8, 7, 255], "RGBA")  # color 0 is transparent
    image.putpixel((0, 0), 0)
    found, notes, _ = open_image(image, DEFAULT_LIMITS, "x")
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((1, 0)) == (9, 8, 7)
    assert notes == NOTE


def test_animations_keep_their_first_frame() -> None:
    frames = [Image.fromarray(smooth(20, 30, seed)).convert("RGBA") for seed in range(2)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    pixels, notes = open_rgb(data)
    np.testing.assert_array_equal(pixels, np.asarray(frames[0].convert("RGB")))
    assert notes == ("first of 2 frames",)


METADATA_NOTE = ("damaged or oversized metadata of the PNG ignored",)
PIXELS = smooth(HEIGHT, WIDTH)
BIG = b"comment\0\0" + zlib.compress(bytes(2_000_000))


def with_chunk(kind: bytes, body: bytes, *, after: bool = False, crc: int | None = None) -> bytes:
    """Return a PNG with one more chunk before or after its pixels."""
    data = png(PIXELS.astype(int), color_type=RGB)
    at = data.index(b"IEND" if after else b"IDAT") - 4
    checksum = zlib.crc32(kind + body) if crc is None else crc
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
    return data[:at] + chunk + data[at:]


@pytest.mark.parametrize(
    "data",
    [
        with_chunk(b"zTXt", BIG),
        with_chunk(b"zTXt", BIG, after=True),
        with_chunk(b"iCCP", BIG),
        with_chunk(b"iTXt", b"comment\0\1\0\0\0" + BIG[9:]),
        with_chunk(b"tEXt", b"comment\0text", crc=1),
        with_chunk(b"tRNS", bytes(6), crc=1),
        with_chunk(b"gAMA", b"\0"),
    ],
)
def test_metadata_that_cannot_be_read_is_ignored(data: bytes) -> None:
    pixels, notes = open_rgb(data)
    np.testing.assert_array_equal(pixels, PIXELS)
    assert notes == METADATA_NOTE


def test_chunks_that_change_pixels_are_kept() -> None:
    """Without its comment a file has its transparent color, orientation and 16 bits."""
    values = samples(16, 3)
    exif = Image.Exif()
    exif[0x112] = 6
    chunks = [(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))]
    options = {"color_type": RGB, "depth": 16, "transparency": values[0, 0].astype(">u2").tobytes()}
    plain = png(values, chunks=chunks, **options)
    pixels, notes = open_rgb(png(values, chunks=[*chunks, (b"zTXt", BIG)], **options))
    np.testing.assert_array_equal(pixels, open_rgb(plain)[0])
    assert notes == ("EXIF orientation applied", *NOTE, *METADATA_NOTE)


def test_damaged_pixels_are_not_blamed_on_metadata() -> None:
    data = with_chunk(b"zTXt", BIG)
    start = data.index(b"IDAT") + 10
    with pytest.raises(InputError, match="image 1 is damaged: its pixels end early"):
        open_rgb(data[:start] + bytes(200) + data[start + 200 :])
    for header in (data[:26], data[:20] + b"\xff" + data[21:]):
        with pytest.raises(InputError, match="image 1 is a damaged PNG file"):
            open_rgb(header)


def test_the_metadata_of_every_frame_are_ignored() -> None:
    frames = [Image.new("RGB", (8, 6), (60 * i, 0, 0)) for i in range(3)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=100)
    at = data.index(b"IDAT") - 4
    chunk = with_chunk(b"zTXt", BIG)
    start = chunk.index(b"zTXt") - 4
    data = data[:at] + chunk[start : start + len(BIG) + 12] + data[at:]
    video = open_video(data, DEFAULT_LIMITS, "x", fps=2, apply_exif_orientation=True)
    assert frames_of(video, range(3), lambda x: x[0, 0, 0].item()) == [0, 60, 120]


def test_a_text_is_not_taken_for_a_note() -> None:
    info = PngImagePlugin.PngInfo()
    for key in ("qwen2vl notes", "composited on white"):
        info.add_text(key, "true")
    assert open_rgb(encoded(PIXELS, pnginfo=info))[1] == ()
