"""Shapes of an answer in pixels, as lines and as drawings."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops

from qwen2vl.cli.boxes import Found, draw_shapes, find, without_marks
from qwen2vl.engine.outputs import ItemReport

ITEM = ItemReport(kind="image", name="a.png", size_given=(400, 200), size_seen=(28, 28), tokens=1)


def test_every_kind_of_shape_is_read() -> None:
    text = (
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(0,0),(500,250)<|box_end|> and "
        "<|box_start|>(100,100)<|box_end|> and "
        "<|object_ref_start|>sign<|object_ref_end|>"
        "<|quad_start|>(0,0),(500,0),(500,500),(0,500)<|quad_end|>"
    )
    assert [found.text for found in find(text, [ITEM])] == [
        "cat: (0, 0) to (100, 100)",
        "cat: (20, 40)",
        "sign: (0, 0) (100, 0) (100, 200) (0, 200)",
    ]


def test_a_phrase_cannot_steer_the_terminal() -> None:
    text = "<|object_ref_start|>\x1b[2Jcat<|object_ref_end|><|box_start|>(1,1)<|box_end|>"
    (found,) = find(text, [ITEM])
    assert found.text == "\\x1b[2Jcat: (0, 0)"


def test_shapes_without_a_phrase_are_numbered() -> None:
    text = "<|box_start|>(0,0),(500,500)<|box_end|><|box_start|>(1,1),(2,2)<|box_end|>"
    assert [found.phrase for found in find(text, [ITEM])] == ["box 1", "box 2"]


@pytest.mark.parametrize("text", ["no shapes", "<|box_start|>(1,2),(3<|box_end|>", ""])
def test_nothing_to_find(text: str) -> None:
    assert find(text, [ITEM]) == []


def test_without_a_picture_there_are_no_pixels() -> None:
    assert find("<|box_start|>(0,0),(500,500)<|box_end|>", []) == []


@pytest.mark.parametrize(
    "corners",
    [
        ((50.0, 50.0),),
        ((10.0, 10.0), (90.0, 60.0)),
        ((10.0, 10.0), (90.0, 20.0), (80.0, 60.0), (15.0, 50.0)),
    ],
)
def test_each_shape_leaves_ink_where_it_stands(corners: tuple[tuple[float, float], ...]) -> None:
    picture = Image.new("RGB", (100, 100), "white")
    blank = picture.copy()
    draw_shapes(picture, [Found(phrase="\u56fe", corners=corners)])
    left, top, right, bottom = ImageChops.difference(picture, blank).getbbox() or (0, 0, 0, 0)
    xs, ys = zip(*corners, strict=True)
    assert left <= min(xs) + 1
    assert right >= max(xs) - 1
    assert top <= min(ys) + 1
    assert bottom >= max(ys) - 1


def test_a_shape_at_the_border_is_drawn_without_a_crash() -> None:
    picture = Image.new("RGB", (30, 30), "white")
    draw_shapes(picture, [Found(phrase="x" * 50, corners=((0.0, 0.0), (29.97, 29.97)))])
    assert picture.getpixel((0, 15)) != (255, 255, 255)


def test_marks_are_taken_out() -> None:
    text = "<|object_ref_start|>cat<|object_ref_end|> <|box_start|>(1,2)<|box_end|>"
    assert without_marks(text) == "cat (1,2)"
