"""Boxes, points and quads in pixels of the image as sent, for each EXIF orientation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from PIL import Image, ImageDraw, ImageOps

from qwen2vl.grounding import Box, Point, Quad
from qwen2vl.server.serving.grounding import to_stored_pixels
from qwen2vl.server.state import ServerState
from tests.server.serving.pictures import data_url
from tests.server.serving.scripted import scripted
from tests.server.serving.test_chat import client, handle
from tests.server.serving.test_chat_stream import read_all

__all__ = ["client"]  # a fixture

ORIENTATIONS = range(1, 9)
SIZE = (168, 112)  # of the upright image
BOX = (20, 30, 60, 90)  # in it
TEXT = (
    "<|object_ref_start|>the box<|object_ref_end|><|box_start|>(119,268),(357,804)<|box_end|> is "
    "<|quad_start|>(119,268),(357,268),(357,804),(119,804)<|quad_end|>"
)


# Orientation -> what a camera does to the upright image.
INVERSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def upright() -> Image.Image:
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).rectangle((BOX[0], BOX[1], BOX[2] - 1, BOX[3] - 1), fill="red")
    return image


def stored(orientation: int) -> tuple[Image.Image, Image.Exif]:
    """Return the image as a camera stores it, with the orientation that makes it upright."""
    image = upright()
    exif = Image.Exif()
    exif[0x112] = orientation
    if orientation != 1:
        image = image.transpose(INVERSE[orientation])
    return image, exif


def red_box(image: Image.Image) -> list[int]:
    """Return where the red box is in the pixels of an image."""
    red = np.asarray(image.convert("RGB"))[:, :, 1] < 128
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def messages_of(*urls: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}} for url in urls
    ]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "Where?"}]}]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_coordinates_are_those_of_the_stored_pixels(
    server_state: ServerState, orientation: int
) -> None:
    image, exif = stored(orientation)
    image.info["exif"] = exif.tobytes()
    assert ImageOps.exif_transpose(image).size == SIZE  # the test's own table is right
    url = data_url(stored(orientation)[0], exif=exif.tobytes())
    state = scripted(server_state, TEXT)
    response = handle(state, messages=messages_of(url), return_grounding=True)
    box, quad = response.choices[0].message.grounding
    assert (box.type, box.label, box.normalized) == ("box", "the box", [119, 268, 357, 804])
    (place,) = box.pixels
    assert place.param == "messages[0].content[0]"
    assert place.coordinates == pytest.approx(red_box(stored(orientation)[0]), abs=0.2)
    (corners,) = (one.coordinates for one in quad.pixels)
    xs, ys = corners[::2], corners[1::2]
    assert [min(xs), min(ys), max(xs), max(ys)] == pytest.approx(place.coordinates, abs=0.1)
    assert response.usage.media[0].original_size.width == SIZE[0]


def test_resizing_is_undone_for_each_image(server_state: ServerState) -> None:
    large = upright().resize((SIZE[0] * 3, SIZE[1] * 3), Image.Resampling.NEAREST)
    messages = messages_of(data_url(large), data_url(upright()))
    response = handle(
        scripted(server_state, TEXT), messages=messages, return_grounding=True, max_pixels=12544
    )
    first, second = response.choices[0].message.grounding[0].pixels
    assert first.param == "messages[0].content[0]" and second.param == "messages[0].content[1]"
    assert first.coordinates == pytest.approx([3 * n for n in BOX], abs=0.5)
    assert second.coordinates == pytest.approx(BOX, abs=0.2)


def test_the_tokens_are_hidden_unless_asked_for(server_state: ServerState) -> None:
    hidden = handle(scripted(server_state, TEXT))
    content = hidden.choices[0].message.content
    assert content == "the box(119,268),(357,804) is (119,268),(357,268),(357,804),(119,804)"
    assert hidden.choices[0].message.grounding is None
    shown = handle(scripted(server_state, TEXT), skip_special_tokens=False, return_grounding=True)
    assert shown.choices[0].message.content == TEXT
    assert [one.pixels for one in shown.choices[0].message.grounding] == [[], []]  # no image


def test_a_stream_has_them_in_the_last_delta(server_state: ServerState) -> None:
    pieces = [TEXT[:30], TEXT[30:90], TEXT[90:]]
    messages = messages_of(data_url(upright()))
    chunks = read_all(scripted(server_state, pieces), messages=messages, return_grounding=True)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert all("grounding" not in delta for delta in deltas[:-1])
    whole = handle(scripted(server_state, TEXT), messages=messages, return_grounding=True)
    expected = [one.model_dump() for one in whole.choices[0].message.grounding]
    assert deltas[-1]["grounding"] == expected


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_points_follow_the_pixels(orientation: int) -> None:
    height, width = 60, 100
    x, y = 30, 15
    marked = np.zeros((height, width), np.uint8)
    marked[y, x] = 255
    image = Image.fromarray(marked)
    if orientation != 1:
        image = image.transpose(INVERSE[orientation])
    ((row, column),) = np.argwhere(np.asarray(image))
    shape = Point(x * 1000 // width + 5, y * 1000 // height + 8)  # the middle of the pixel
    found = to_stored_pixels(shape, (height, width), orientation)
    assert found == pytest.approx([column + 0.5, row + 0.5], abs=0.1)


def test_quads_keep_the_order_of_their_corners() -> None:
    corners = (Point(0, 0), Point(500, 0), Point(500, 500), Point(0, 500))
    assert to_stored_pixels(Quad(corners), (100, 200), 3) == [200, 100, 100, 100, 100, 50, 200, 50]
    assert to_stored_pixels(Box(0, 0, 500, 500), (100, 200), 3) == [100, 50, 200, 100]


def test_a_box_of_the_model(client: OpenAI) -> None:
    image = Image.new("RGB", (112, 84), "white")
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((10, 22, 45, 57), fill="red")
    canvas.rectangle((65, 30, 100, 65), fill="green")
    messages: Any = messages_of(data_url(image))
    messages[0]["content"][1]["text"] = "Where is the red circle?"
    answer: Any = client.chat.completions.create(
        model="nano",
        messages=messages,
        max_tokens=64,
        extra_body={"return_grounding": True},
    )
    message = answer.choices[0].message
    assert "<|" not in message.content
    (box,) = message.grounding
    assert box["type"] == "box"
    assert box["pixels"][0]["coordinates"] == pytest.approx([10, 22, 46, 58], abs=6)
