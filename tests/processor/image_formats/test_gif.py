"""GIF: frames that are smaller than the canvas, and their disposal, are composed as by browsers."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import DEFAULT_LIMITS, MediaLimits
from qwen2vl.processor.media.video_source import open_video
from tests.media import encoded, frames_of, smooth
from tests.processor.image_formats.reference import (
    HEIGHT,
    WIDTH,
    differences_from_imagemagick,
    open_rgb,
)
from tests.requirements import needs_imagemagick

PALETTED = Image.fromarray(smooth(HEIGHT, WIDTH)).quantize(16)
KEY = int(np.asarray(PALETTED)[3, 4])  # index of a color that the small frame has
NOTE = ("transparency composited on white",)
KEEP, TO_BACKGROUND, TO_PREVIOUS = 1, 2, 3


def small_frame(**options: int) -> bytes:
    """Return a GIF whose only frame covers 10 x 6 pixels of the canvas, at (4, 3)."""
    # Pillow drops colors that are not used, and renumbers the others, unless told otherwise.
    data = bytearray(encoded(PALETTED.crop((4, 3, 14, 9)), "GIF", optimize=False, **options))
    data[6:10] = struct.pack("<HH", WIDTH, HEIGHT)
    start = data.index(b"\x2c", 13 + 3 * (2 << (data[10] & 7)))
    data[start + 1 : start + 5] = struct.pack("<HH", 4, 3)
    return bytes(data)


def animated(
    boxes: Sequence[tuple[int, int, int, int]],
    disposals: Sequence[int],
    transparency: int | None = None,
    *,
    has_gray_palette: bool = False,
) -> bytes:
    """Write frame i in color i + 1 over its box (left, upper, right, lower) of 8 x 6 pixels.

    Color 0, that of the background, is red. With a gray palette of the file, all frames but the
    first have the palette of colors.
    """
    colors = bytes((255, 0, 0, 0, 0, 60, 0, 0, 120, 0, 0, 180, *[0] * 12))
    palette = np.arange(8, dtype=np.uint8).repeat(3).tobytes() if has_gray_palette else colors
    data = b"GIF89a" + struct.pack("<HHBBB", 8, 6, 0xA2, 0, 0) + palette
    for number, (box, disposal) in enumerate(zip(boxes, disposals, strict=True)):
        left, upper, right, lower = box
        flags, key = disposal << 2, 0
        if transparency is not None:
            flags, key = flags | 1, transparency
        data += b"!\xf9\x04" + struct.pack("<BHBB", flags, 10, key, 0)
        size = right - left, lower - upper
        has_own = has_gray_palette and number > 0
        data += b"," + struct.pack("<HHHHB", left, upper, *size, 0x82 if has_own else 0)
        data += colors if has_own else b""
        body = _uncompressed([number + 1] * (size[0] * size[1]))
        data += b"\x03" + bytes([len(body)]) + body + b"\0"
    return data + b";"


def _uncompressed(indices: Sequence[int]) -> bytes:
    """Return indices of 3 bits as LZW codes of 4 bits, with a clear code after every fourth."""
    codes = [code for i, index in enumerate(indices) for code in ([8] * (i % 4 == 0) + [index])]
    codes += [9, 0]
    return bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=False))


def animation_frames(data: bytes) -> list[np.ndarray]:
    video = open_video(data, DEFAULT_LIMITS, "x", fps=2, apply_exif_orientation=True)
    frames = frames_of(video, range(len(video.metadata.timestamps)))
    assert frames is not None
    return frames


@pytest.mark.parametrize(
    "options", [{}, *({"transparency": KEY, "disposal": number} for number in range(4))]
)
def test_what_a_frame_leaves_free_is_white(options: dict[str, int]) -> None:
    pixels, notes = open_rgb(small_frame(**options))
    inside = np.asarray(PALETTED.convert("RGB")).copy()
    is_transparent = np.asarray(PALETTED) == options.get("transparency", -1)
    assert is_transparent[3:9, 4:14].any() == bool(options)
    inside[is_transparent] = 255
    expected = np.full((HEIGHT, WIDTH, 3), 255)
    expected[3:9, 4:14] = inside[3:9, 4:14]
    np.testing.assert_array_equal(pixels, expected)
    assert notes == NOTE


def test_an_image_that_a_user_opened() -> None:
    with Image.open(io.BytesIO(small_frame())) as image:
        found = open_image(image, DEFAULT_LIMITS, "x").image
    np.testing.assert_array_equal(np.asarray(found), open_rgb(small_frame())[0])


@needs_imagemagick
def test_pixels_equal_imagemagick() -> None:
    files = {
        f"{options}": encoded(PALETTED, "GIF", **options) for options in ({}, {"transparency": KEY})
    }
    files |= {"small": small_frame(), "small, transparent": small_frame(transparency=KEY)}
    files["small, disposed of"] = small_frame(transparency=KEY, disposal=TO_BACKGROUND)
    assert differences_from_imagemagick(files, "gif") == []


@pytest.mark.parametrize("transparency", [None, 7])
@pytest.mark.parametrize("method", [KEEP, TO_BACKGROUND, TO_PREVIOUS])
def test_later_frames_are_composed_on_a_transparent_canvas(
    method: int, transparency: int | None
) -> None:
    """Whether a frame has a transparent color changes nothing where it draws none."""
    boxes = [(1, 1, 5, 4), (3, 2, 8, 6), (0, 5, 2, 6)]
    found = animation_frames(animated(boxes, [method] * 3, transparency))
    canvas = np.full((6, 8, 3), 255)
    for number, (left, upper, right, lower) in enumerate(boxes):
        before = canvas.copy()
        canvas[upper:lower, left:right] = (0, 0, 60 * (number + 1))
        np.testing.assert_array_equal(found[number], canvas)
        if method == TO_BACKGROUND:
            canvas[upper:lower, left:right] = 255
        elif method == TO_PREVIOUS:
            canvas = before


def test_opaque_animations_are_those_of_pillow() -> None:
    pictures = [Image.fromarray(smooth(20, 30, seed)).quantize(32) for seed in range(3)]
    data = encoded(pictures[0], "GIF", save_all=True, append_images=pictures[1:], duration=100)
    with Image.open(io.BytesIO(data)) as image:
        for number, found in enumerate(animation_frames(data)):
            image.seek(number)
            np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


def test_a_frame_that_enlarges_the_canvas_is_within_the_limits() -> None:
    data = animated([(0, 0, 8, 6), (0, 0, 3, 2)], [KEEP] * 2)
    at = data.rindex(b",") + 1
    data = data[:at] + struct.pack("<HH", 4000, 4000) + data[at + 4 :]
    limits = MediaLimits(max_image_pixels=10**6)
    video = open_video(data, limits, "x", fps=2, apply_exif_orientation=True)
    assert len(video.metadata.timestamps) == 1
    assert video.metadata.notes == ("damaged after 1 of 2 frames; the first ones were used",)


def test_colors_after_a_gray_first_frame() -> None:
    """Pillow decodes the later frames without their palette."""
    boxes = [(0, 0, 8, 6), (2, 1, 5, 4)]
    first, second = animation_frames(animated(boxes, [KEEP] * 2, has_gray_palette=True))
    assert (first == 1).all()
    assert (second[1:4, 2:5] == (0, 0, 120)).all()
    assert second[0, 0].tolist() == [1, 1, 1]
