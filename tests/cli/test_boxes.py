"""Grounding shapes of a completion in pixels: as text and drawn."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops

from qwen2vl.cli.boxes import PixelShape, draw_shapes, parse_shapes, strip_grounding_tokens
from qwen2vl.engine.outputs import ItemReport

ITEM = ItemReport(
    kind="image", name="a.png", original_size=(400, 200), resized_size=(28, 28), tokens=1
)


def test_boxes_points_and_quads_are_parsed() -> None:
    text = (
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(0,0),(500,250)<|box_end|> and "
        "<|box_start|>(100,100)<|box_end|> and "
        "<|object_ref_start|>sign<|object_ref_end|>"
        "<|quad_start|>(0,0),(500,0),(500,500),(0,500)<|quad_end|>"
    )
    assert [shape.text for shape in parse_shapes(text, [ITEM])] == [
        "cat: (0, 0) to (100, 100)",
        "cat: (20, 40)",
        "sign: (0, 0) (100, 0) (100, 200) (0, 200)",
    ]


def test_control_characters_of_a_phrase_are_escaped() -> None:
    text = "<|object_ref_start|>\x1b[2Jcat<|object_ref_end|><|box_start|>(1,1)<|box_end|>"
    (shape,) = parse_shapes(text, [ITEM])
    assert shape.text == "\\x1b[2Jcat: (0, 0)"


def test_shapes_without_a_phrase_are_numbered() -> None:
    text = "<|box_start|>(0,0),(500,500)<|box_end|><|box_start|>(1,1),(2,2)<|box_end|>"
    assert [shape.phrase for shape in parse_shapes(text, [ITEM])] == ["box 1", "box 2"]


@pytest.mark.parametrize("text", ["no shapes", "<|box_start|>(1,2),(3<|box_end|>", ""])
def test_text_without_shapes(text: str) -> None:
    assert parse_shapes(text, [ITEM]) == []


def test_without_an_image_there_are_no_pixel_shapes() -> None:
    assert parse_shapes("<|box_start|>(0,0),(500,500)<|box_end|>", []) == []


@pytest.mark.parametrize(
    "corners",
    [
        ((50.0, 50.0),),
        ((10.0, 10.0), (90.0, 60.0)),
        ((10.0, 10.0), (90.0, 20.0), (80.0, 60.0), (15.0, 50.0)),
    ],
)
def test_each_shape_is_drawn_at_its_corners(corners: tuple[tuple[float, float], ...]) -> None:
    image = Image.new("RGB", (100, 100), "white")
    blank = image.copy()
    draw_shapes(image, [PixelShape(phrase="\u56fe", corners=corners)])
    left, top, right, bottom = ImageChops.difference(image, blank).getbbox() or (0, 0, 0, 0)
    xs, ys = zip(*corners, strict=True)
    assert left <= min(xs) + 1
    assert right >= max(xs) - 1
    assert top <= min(ys) + 1
    assert bottom >= max(ys) - 1


def test_a_shape_at_the_border_is_drawn() -> None:
    image = Image.new("RGB", (30, 30), "white")
    draw_shapes(image, [PixelShape(phrase="x" * 50, corners=((0.0, 0.0), (29.97, 29.97)))])
    assert image.getpixel((0, 15)) != (255, 255, 255)


def test_grounding_tokens_are_removed() -> None:
    text = "<|object_ref_start|>cat<|object_ref_end|> <|box_start|>(1,2)<|box_end|>"
    assert strip_grounding_tokens(text) == "cat (1,2)"
