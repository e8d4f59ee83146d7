"""Grounding format: official text, pixel conversion, and malformed model output."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.errors import InputError
from qwen2vl.grounding import (
    Box,
    CoordinateError,
    Grounding,
    ObjectRef,
    Point,
    Quad,
    check_normalized,
    check_pixels,
    parse,
)

SIZE = (480, 640)  # height, width

sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
thousandths = st.integers(0, 999)
points = st.builds(Point, thousandths, thousandths)
boxes = st.builds(
    lambda xs, ys: Box(min(xs), min(ys), max(xs), max(ys)),
    st.tuples(thousandths, thousandths),
    st.tuples(thousandths, thousandths),
)
quads = st.builds(Quad, st.tuples(points, points, points, points))


def test_the_example_of_the_paper() -> None:
    text = ObjectRef("the eyes on a giraffe").to_text() + Box(176, 106, 232, 160).to_text()
    assert text == (
        "<|object_ref_start|>the eyes on a giraffe<|object_ref_end|>"
        "<|box_start|>(176,106),(232,160)<|box_end|>"
    )
    assert parse(text) == [Grounding(Box(176, 106, 232, 160), "the eyes on a giraffe")]


def test_a_box_in_pixels_is_relative_to_width_and_height() -> None:
    box = Box.from_pixels([64, 48, 320, 240], SIZE)
    assert box == Box(100, 100, 500, 500)
    assert box.to_pixels(SIZE) == (64.0, 48.0, 320.0, 240.0)


def test_a_quad_keeps_the_order_of_its_corners() -> None:
    quad = Quad.from_pixels([64, 48, 320, 48, 320, 240, 64, 240], SIZE)
    assert quad.to_text() == ("<|quad_start|>(100,100),(500,100),(500,500),(100,500)<|quad_end|>")
    assert quad.to_pixels(SIZE) == (64, 48, 320, 48, 320, 240, 64, 240)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ([0, 0, 640, 480], Box(0, 0, 999, 999)),  # 1000 is not in [0, 1000)
        ([-5, -0.1, 700, 1e9], Box(0, 0, 999, 999)),
        ([0.32, 0.24, 0.96, 0.72], Box(1, 1, 2, 2)),  # halves go up, also from 0.5 and 1.5
    ],
)
def test_pixels_are_rounded_and_clamped(pixels: list[float], expected: Box) -> None:
    assert Box.from_pixels(pixels, SIZE) == expected


@pytest.mark.parametrize("numbers", [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, math.nan, 4], []])
def test_invalid_pixel_coordinates_are_rejected(numbers: list[float]) -> None:
    with pytest.raises(InputError, match="expected 4 finite numbers in pixels, got"):
        Box.from_pixels(numbers, SIZE)


@given(st.lists(boxes | quads, max_size=5), st.text("abc ,.()", max_size=9))
def test_text_round_trip(shapes: list[Box | Quad], between: str) -> None:
    text = between.join(shape.to_text() for shape in shapes)
    assert [grounding.shape for grounding in parse(text)] == shapes


@given(boxes | quads | points, sizes)
def test_round_trip_through_pixels(shape: Box | Quad | Point, size: tuple[int, int]) -> None:
    assert type(shape).from_pixels(shape.to_pixels(size), size) == shape


@given(st.data(), sizes)
def test_pixels_round_trip_within_half_a_thousandth(
    data: st.DataObject, size: tuple[int, int]
) -> None:
    height, width = size
    x = data.draw(st.floats(0, width * 0.999))
    y = data.draw(st.floats(0, height * 0.999))
    round_trip = Point.from_pixels([x, y], size).to_pixels(size)
    assert abs(round_trip[0] - x) <= width / 2000 * (1 + 1e-9)
    assert abs(round_trip[1] - y) <= height / 2000 * (1 + 1e-9)


def test_a_phrase_applies_until_the_next() -> None:
    a, b, c = Box(1, 2, 3, 4), Box(5, 6, 7, 8), Box(9, 10, 11, 12)
    text = (
        a.to_text() + ObjectRef("cats").to_text() + a.to_text() + " and " + b.to_text()
        + ObjectRef("a dog").to_text() + c.to_text()
    )  # fmt: skip
    assert parse(text) == [
        Grounding(a, None),
        Grounding(a, "cats"),
        Grounding(b, "cats"),
        Grounding(c, "a dog"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|box_start|>(1,2),(3,4)", [Box(1, 2, 3, 4)]),  # truncated output
        ("<|box_start|>(1,2),(3,4)<|im_end|>", [Box(1, 2, 3, 4)]),
        ("<|box_start|>[1, 2, 3, 4]<|box_end|>", [Box(1, 2, 3, 4)]),
        ("<|box_start|>( 1 ,2 ) (3.4,4.5)<|box_end|>", [Box(1, 2, 3, 5)]),
        ("<|box_start|>(3,4),(1,2)<|box_end|>", [Box(1, 2, 3, 4)]),
        ("<|box_start|>(-3,4),(1000,20000)<|box_end|>", [Box(0, 4, 999, 999)]),
        (
            f"<|box_start|>(-{'7' * 400},4),(5,{'7' * 400}",
            [Box(0, 4, 5, 999)],
        ),  # digit repetition loop
        ("<|box_start|>(1,2)<|box_end|>", [Point(1, 2)]),
        ("<|box_start|>(1,2),(3,4),(5,6),(7,8)<|box_end|>", [Box(1, 2, 3, 4), Box(5, 6, 7, 8)]),
        ("<|box_start|>(1,2),(3<|box_end|>", []),
        ("<|box_start|><|box_end|>", []),
        ("<|box_start|>\n(1,2),\n(3,4)\n<|box_end|>", [Box(1, 2, 3, 4)]),
        ("<|quad_start|>(1,2),(3,4)<|quad_end|>", []),
        ("<|box_start|><|box_start|>(1,2),(3,4)<|box_end|>", [Box(1, 2, 3, 4)]),
        ("no box, but (1,2),(3,4)", []),
        ("", []),
    ],
)
def test_malformed_model_output_is_tolerated(text: str, expected: list[Box | Point]) -> None:
    assert [grounding.shape for grounding in parse(text)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"point": (348,291)}', [Point(348, 291)]),
        ("the cat(176,106),(232,160)", [Box(176, 106, 232, 160)]),
        ("<|box_start|>(1,2),(3,4)<|box_end|> near (5, 6)", [Box(1, 2, 3, 4), Point(5, 6)]),
        ("(see 3) and (1,2,3)", []),
    ],
)
def test_bare_coordinates_are_parsed_on_request(text: str, expected: list[Box | Point]) -> None:
    assert [grounding.shape for grounding in parse(text, bare=True)] == expected


@given(st.text(max_size=60) | st.text("<|box_startend>quad(1,.-) \n", max_size=80))
def test_the_parser_never_fails(text: str) -> None:
    for grounding in parse(text, bare=True):
        for value in grounding.shape.to_pixels((1000, 1000)):
            assert 0 <= value < 1000


@pytest.mark.parametrize(
    "numbers",
    [
        [0, 0, 640, 480],
        [-2, -2, 642, 482],
        [0.5, 0, 1.5, 1],
        [0, 1],
        [640, 480],
        [3, 3, 3, 3],
        [1, 1, 1, 1],
    ],
)
def test_pixels_in_the_image_or_at_its_border_are_accepted(numbers: list[float]) -> None:
    check_pixels(numbers, SIZE, "box")


@pytest.mark.parametrize(
    ("numbers", "error"),
    [
        (
            [0.1, 0.2, 0.6, 0.8],
            "these are fractions, less than one pixel; multiply x by 640 and y by 480",
        ),
        ([0, 0, 1, 1], "less than one pixel"),
        ([0.5, 0.25], "multiply x by 640 and y by 480"),
        ([0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.1, 0.9], "less than one pixel"),
        (
            [100, 200, 600, 800],
            "is [100, 200, 600, 800], in an image of 640 x 480 (width x height)",
        ),
        (
            [0, 0, 643, 480],
            "more than 2 pixels outside; give pixels of this image, as it is stored",
        ),
        ([-3, 0, 10, 10], "more than 2 pixels outside"),
        ([10, 483], "more than 2 pixels outside"),
    ],
)
def test_pixels_outside_the_image_and_fractions_are_refused(
    numbers: list[float], error: str
) -> None:
    with pytest.raises(CoordinateError, match=re.escape(error)):
        check_pixels(numbers, SIZE, "messages[1].content[0].box")


@pytest.mark.parametrize(
    "text",
    [
        "<|box_start|>(0,0),(1000,999)<|box_end|> in 2195 pixels, (412,2166)",
        "<|object_ref_start|>1200 dogs<|object_ref_end|>",
        "",
    ],
)
def test_thousandths_and_numbers_elsewhere_are_accepted(text: str) -> None:
    check_normalized(text, "messages[1]")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("<|box_start|>(412,2166),(621,2195)<|box_end|>", "2166"),
        ("<|box_start|>(1,2),(3,4)<|box_end|> <|box_start|>(5,6),(7,1001)", "1001"),
        ("<|quad_start|>(1,2),(3,4),(5,6),(-7,8)<|quad_end|>", "-7"),
    ],
)
def test_pixels_in_box_tokens_are_refused(text: str, number: str) -> None:
    with pytest.raises(CoordinateError, match=rf"messages\[1\] has {number} in <.*give pixels as"):
        check_normalized(text, "messages[1]")
