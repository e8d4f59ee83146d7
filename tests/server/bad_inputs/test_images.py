"""Bad and unusual images: refused by name, or answered as the equal plain image is."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.media import FORMATS, animation, encoded, noise, png_header, smooth
from tests.processor.test_bad_images import (
    IMAGE as IMAGE_OF_TEXT_BOMB,
)
from tests.processor.test_bad_images import (
    color_keyed,
    exif_of,
    flipped,
    half_transparent,
    real_bomb,
    text_bomb,
)
from tests.server.bad_inputs.suite import Suite, covers, image_item, text_item, video_item

IMAGE = smooth(84, 112)
QUESTION = text_item("What is it?")


def answer(suite: Suite, source: bytes | str, **options: Any) -> tuple[Any, ...]:
    return suite.accepted([image_item(source, **options), QUESTION]).answer


def same_answer(suite: Suite, source: bytes | str, expected: bytes) -> None:
    """Check that two encodings of the same pixels get the same answer, from separate caches."""
    first = suite.accepted([image_item(source), QUESTION], cache_salt="a")
    second = suite.accepted([image_item(expected), QUESTION], cache_salt="b")
    assert first.answer == second.answer


@functools.cache
def half(kind: str) -> bytes:
    data = encoded(IMAGE, kind)
    return data[: len(data) // 2]


@covers(
    "image truncated to half (JPEG)",
    "image truncated to half (PNG)",
    "image truncated to half (GIF)",
    "image truncated to half (TIFF)",
    "image truncated to half (BMP)",
    "image truncated to half (WEBP)",
    "image header only (24 bytes)",
)
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated(suite: Suite, kind: str) -> None:
    suite.refused([image_item(half(kind)), QUESTION], text="damaged")
    suite.refused([image_item(encoded(IMAGE, kind)[:24]), QUESTION], text="damaged")


@covers("TIFF/BMP missing last byte")
@pytest.mark.parametrize("kind", ["TIFF", "BMP"])
def test_last_byte_missing(suite: Suite, kind: str) -> None:
    suite.refused([image_item(encoded(IMAGE, kind)[:-1])], text="damaged")


@covers("JPEG, PNG or GIF missing last byte")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_last_byte_that_holds_no_pixels(suite: Suite, kind: str) -> None:
    same_answer(suite, encoded(IMAGE, kind)[:-1], encoded(IMAGE, kind))


@covers("PNG with 50 MB compressed text chunk")
def test_text_that_holds_no_pixels(suite: Suite) -> None:
    same_answer(suite, text_bomb(), encoded(IMAGE_OF_TEXT_BOMB))


@covers("bit flip in the middle, JPEG/WEBP/TIFF")
@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_byte(suite: Suite, kind: str) -> None:
    data = encoded(smooth(150, 200) if kind in ("PNG", "GIF") else noise(60, 80), kind)
    sent = suite.ask([image_item(flipped(data, len(data) // 2)), QUESTION])
    if kind in ("PNG", "GIF"):
        assert (sent.status, sent.error["param"]) == (400, "messages[0].content[0]")
    else:
        assert sent.status in (200, 400), sent.body
        assert sent.status == 200 or "damaged" in sent.error["message"]


HEADS = {
    b"<svg xmlns='http://www.w3.org/2000/svg'>": "image/svg",
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "image/heic",
    b"%PDF-1.4\n": "application/pdf",
    b"%!PS-Adobe-3.0 EPSF-3.0\n": "application/postscript",
    b"\0\0\0\x0cjP  \r\n\x87\n": "image/jp2",
    b"8BPS\0\1": "photoshop",
}
REFUSED: list[tuple[str, str, Callable[[], bytes], str]] = [
    ("crc", "PNG with wrong CRC", lambda: flipped(encoded(IMAGE), 30), "damaged"),
    ("empty", "empty bytes", lambda: b"", r"empty \(0 bytes\)"),
    (
        "html",
        "HTML 404 page or JSON instead of image",
        lambda: b"<!doctype html><title>404</title>",
        "text/html, not a supported",
    ),
    (
        "json",
        "HTML 404 page or JSON instead of image",
        lambda: b'{"error": "not found"}',
        "application/json",
    ),
    *(
        (kind, "SVG / HEIC / PDF / EPS / JPEG2000 / PSD", lambda head=head: head + bytes(64), kind)
        for head, kind in HEADS.items()
    ),
    ("width", "PNG width 2^31-1", lambda: png_header(2**31 - 1, 1), "pixels, limit is"),
    ("no-width", "image with zero width or height", lambda: png_header(0, 10), "damaged"),
    ("no-height", "image with zero width or height", lambda: png_header(10, 0), "damaged"),
    (
        "1x499",
        "image of height 1 (1x499) or height 3 (3x22)",
        lambda: encoded(Image.new("RGB", (499, 1))),
        "aspect ratio 499, limit 200",
    ),
    (
        "2801x14",
        "aspect ratio exactly 200 / just above 200",
        lambda: encoded(Image.new("RGB", (2801, 14))),
        "aspect ratio 200.07",
    ),
    (
        "1x100000",
        "1x100000 image",
        lambda: encoded(Image.new("1", (100_000, 1))),
        "aspect ratio",
    ),
    (
        "float",
        "float TIFF",
        lambda: encoded(np.full((9, 9), 4000, np.float32), "TIFF"),
        "are not colors",
    ),
]


@covers(*(row[1] for row in REFUSED))
@pytest.mark.parametrize(
    ("make", "text"), [row[2:] for row in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused(suite: Suite, make: Callable[[], bytes], text: str) -> None:
    items = [text_item("first"), image_item(make())]
    suite.refused(items, text=text, param="messages[0].content[1]")


@covers(
    "decompression bomb header 30000x30000",
    "real bomb 12000x12000 zeros PNG (420 KB, 432 MB raw)",
)
@pytest.mark.parametrize("make", [lambda: png_header(30000, 30000), real_bomb], ids=["30k", "12k"])
def test_decompression_bomb(suite: Suite, make: Callable[[], bytes]) -> None:
    """Refused from the header: little CPU time and memory, the reading of the body included."""
    item = image_item(make())
    suite.refused([item], text="pixels")  # what is cached or imported once
    seconds = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        start = time.process_time()
        text = "limit is 50,000,000"
        assert suite.refused([item], text=text)["code"] == "media_too_large"
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.2  # the client of the test included; decoding would take seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


@covers("PNG with trailing garbage / JPEG+JPEG polyglot", "broken ICC profile")
def test_ignored_bytes(suite: Suite) -> None:
    jpeg = encoded(IMAGE, "JPEG")
    same_answer(suite, encoded(IMAGE) + b"garbage" * 99, encoded(IMAGE))
    same_answer(suite, jpeg + encoded(noise(50, 50), "JPEG"), jpeg)
    same_answer(suite, encoded(IMAGE, "JPEG", icc_profile=bytes(500)), jpeg)


@covers("declared mime differs from content", "data URL with charset parameter")
def test_declared_type(suite: Suite) -> None:
    gif = encoded(IMAGE, "GIF")
    sent = suite.accepted([image_item(gif), QUESTION])  # declared as image/png
    assert "declared as image/png, read as image/gif" in str(sent.media[0]["notes"])
    url = image_item(gif)["image_url"]["url"].replace("image/png", "image/gif;charset=utf-8")
    same_answer(suite, url, gif)


@covers(
    "1x1 pixel image",
    "image of height 1 (1x499) or height 3 (3x22)",
    "image smaller than 28 px on a side",
    "aspect ratio exactly 200 / just above 200",
)
@pytest.mark.parametrize("size", [(1, 1), (22, 3), (3, 22), (257, 27), (2800, 14)])
def test_small_and_narrow(suite: Suite, size: tuple[int, int]) -> None:
    sent = suite.accepted([image_item(encoded(noise(size[1], size[0]))), QUESTION])
    assert sent.media[0]["tokens"] >= 4
    assert sent.media[0]["original_size"] == {"width": size[0], "height": size[1]}


@covers("31x639 with max_pixels=20*784")
def test_budget_of_a_narrow_image(suite: Suite) -> None:
    image = encoded(noise(31, 639))
    sent = suite.accepted([image_item(image, max_pixels=20 * 784), QUESTION])
    assert 0 < sent.media[0]["tokens"] <= 20
    sent = suite.accepted([image_item(image), QUESTION], mm_processor_kwargs={"max_pixels": 15680})
    assert 0 < sent.media[0]["tokens"] <= 20


@covers("min_pixels > max_pixels, negative or huge pixel options")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_pixels": 50_176, "max_pixels": 12_544}, "50176.*12544"),
        ({"min_pixels": -5}, "-5"),
        ({"max_pixels": 0}, "0"),
        ({"max_pixels": 10**15}, "1000000000000000"),
        ({"max_pixels": 1.5}, "1.5"),
        ({"max_pixels": "many"}, "many"),
        ({"min_pixels": True}, "[Tt]rue"),
        ({"resized_height": 100}, "resized_width"),
        ({"resized_height": 10**9, "resized_width": 10**9}, "1000000000"),
    ],
)
def test_pixel_options(suite: Suite, options: dict[str, Any], text: str) -> None:
    image = encoded(IMAGE)
    suite.refused([image_item(image, **options)], text=text)
    if "resized_height" not in options:
        sent = suite.ask([image_item(image)], mm_processor_kwargs=options)
        assert sent.status == 400, sent.body
        assert str(next(iter(options))) in sent.error["param"]


TRANSPOSED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}


@covers("EXIF orientation 2..8")
@pytest.mark.parametrize("orientation", TRANSPOSED)
def test_orientation(suite: Suite, orientation: int) -> None:
    upright = encoded(TRANSPOSED[orientation](IMAGE))
    tagged = encoded(IMAGE, exif=exif_of(orientation))
    same_answer(suite, tagged, upright)
    assert answer(suite, tagged) != answer(suite, encoded(IMAGE))


@covers("EXIF garbage or orientation 99")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_garbage(suite: Suite, kind: str) -> None:
    for exif in (exif_of(99), b"Exif\0\0" + b"\xff" * 200):
        same_answer(suite, encoded(IMAGE, kind, exif=exif), encoded(IMAGE, kind))


@covers("EXIF ImageID UUID equal for two different images")
def test_identifier_in_the_exif_is_no_cache_key(suite: Suite) -> None:
    exif = Image.Exif()
    exif[0xA420] = "550e8400-e29b-41d4-a716-446655440000"
    first, second = noise(56, 56, 1), smooth(56, 56, 2)
    tagged = [encoded(one, exif=exif.tobytes()) for one in (first, second)]
    assert answer(suite, tagged[0]) == answer(suite, encoded(first))
    assert answer(suite, tagged[1]) == answer(suite, encoded(second))
    assert answer(suite, tagged[0]) != answer(suite, tagged[1])


@covers(
    "CMYK JPEG",
    "16-bit grayscale PNG/TIFF",
    "float TIFF",
    "1-bit and L images",
    "palette image with transparency, RGB+tRNS, LA, RGBA",
)
def test_modes_equal_their_rgb(suite: Suite) -> None:
    gray = encoded(np.full((56, 56, 3), 128, np.uint8))
    white_right = np.zeros((56, 56, 3), np.uint8)
    white_right[:, 28:] = 255
    for kind in ("PNG", "TIFF"):
        same_answer(suite, encoded(np.full((56, 56), 32768, np.uint16), kind), gray)
    same_answer(suite, encoded(np.full((56, 56), 0.5, np.float32), "TIFF"), gray)
    same_answer(suite, encoded(np.full((56, 56), 128, np.uint8)), gray)
    same_answer(
        suite, encoded(Image.new("1", (56, 56), 1)), encoded(np.full((56, 56, 3), 255, np.uint8))
    )
    for mode in ("LA", "RGBA"):
        same_answer(suite, encoded(half_transparent(mode)), encoded(white_right))
    same_answer(suite, color_keyed("P", 1), encoded(white_right))
    same_answer(suite, color_keyed("RGB", (9, 9, 9)), encoded(white_right))
    cmyk = encoded(Image.new("CMYK", (56, 56), (0, 255, 255, 0)), "JPEG")
    assert answer(suite, cmyk) != answer(suite, gray)


@covers("animated GIF / WebP / APNG / multi-page TIFF as image")
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation(suite: Suite, kind: str) -> None:
    data = animation(kind)
    sent = suite.accepted([image_item(data), QUESTION])
    assert "first of 4 frames" in str(sent.media[0]["notes"])
    assert sent.answer == answer(suite, encoded(np.zeros((40, 60, 3), np.uint8)))
    clip = suite.accepted([video_item(data), QUESTION])
    assert clip.media[0]["frames"] == 4


@covers("two images same bytes different shape/mode/palette")
def test_same_bytes_of_another_shape(suite: Suite) -> None:
    pixels = noise(56, 112)
    images = [
        encoded(pixels),
        encoded(pixels.reshape(112, 56, 3)),
        encoded(Image.fromarray(pixels.reshape(56 * 3, 112), "L")),
        *(palette_image(shade) for shade in (20, 220)),
    ]
    shared = [answer(suite, image) for image in images]
    for index, image in enumerate(images):
        alone = suite.accepted([image_item(image), QUESTION], cache_salt=f"shape{index}")
        assert shared[index] == alone.answer
    assert len(set(shared)) == len(images)


def palette_image(shade: int) -> bytes:
    image = Image.new("P", (56, 56), 0)
    image.putpalette([shade, 0, 0, 9, 9, 9])
    return encoded(image)


@covers("more images than the limit")
def test_too_many_images(suite: Suite) -> None:
    item = image_item(encoded(smooth(28, 28)))
    suite.refused([item] * 17, text="17 images, at most 16", param="messages[0].content[16]")
    suite.accepted([*[item] * 16, QUESTION])


@covers("image in a system or assistant message")
def test_image_in_other_roles(suite: Suite) -> None:
    item = image_item(encoded(smooth(28, 28)))
    for role in ("system", "assistant"):
        messages = [{"role": role, "content": [item]}, {"role": "user", "content": "hi"}]
        sent = suite.chat(messages)
        assert sent.status == 200, sent.body
        assert sent.media[0]["param"] == "messages[0].content[0]"
