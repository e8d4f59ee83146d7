"""Grounding shapes of a completion in pixels, as readable text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen2vl.cli.boxes import (
    GroundingText,
    parse_shapes,
    readable_text,
    strip_grounding_tokens,
)
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


def test_grounding_tokens_are_removed() -> None:
    text = "<|object_ref_start|>cat<|object_ref_end|> <|box_start|>(1,2)<|box_end|>"
    assert strip_grounding_tokens(text) == "cat (1,2)"


CAT = "<|object_ref_start|>cat<|object_ref_end|>"
BOX = "<|box_start|>(0,0),(500,250)<|box_end|>"
POINT = "<|box_start|>(100,100)<|box_end|>"
WIDE = replace(ITEM, name="b.png", original_size=(400, 2000))


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        ("no shapes <b> <| |>", "no shapes <b> <| |>"),
        (f"The {CAT}{BOX} sleeps.", "The cat: (0, 0) to (100, 100) sleeps."),
        (f"{CAT}{BOX}{CAT}{POINT}", "cat: (0, 0) to (100, 100)\ncat: (20, 40)"),
        (f"{CAT}{BOX}\n{CAT}{POINT}", "cat: (0, 0) to (100, 100)\ncat: (20, 40)"),
        (f"{CAT}{BOX}{POINT}", "cat: (0, 0) to (100, 100), (20, 40)"),
        (BOX, "(0, 0) to (100, 100)"),
        ("<|object_ref_start|>cat<|box_start|>(0,0),(500,250)", "cat: (0, 0) to (100, 100)"),
        ("<|box_start|>(1,2),(3<|box_end|>.", "(1,2),(3."),
        (f"{CAT} and<|box_en", "cat and<|box_en"),
    ],
)
@pytest.mark.parametrize("length", [1, 3, 1000])
def test_streamed_text_is_readable(text: str, readable: str, length: int) -> None:
    converter = GroundingText([ITEM])
    pieces = [converter.feed(text[i : i + length]) for i in range(0, len(text), length)]
    assert "".join([*pieces, converter.finish()]) == readable
    if length == 1:
        assert all(len(piece) < 40 for piece in pieces), "text is not held back"


def test_text_before_a_span_is_not_held_back() -> None:
    converter = GroundingText([ITEM])
    assert converter.feed("The <|object_ref_start|>ca") == "The "
    assert converter.feed("t<|object_ref_end|> is") == "cat is"


def test_images_of_several_sizes_have_their_own_pixels() -> None:
    same_size = replace(ITEM, name="c.png")
    both = "cat: (0, 0) to (100, 100) in a.png, (0, 0) to (1000, 100) in b.png"
    assert readable_text(CAT + BOX, [ITEM, WIDE, same_size]) == both
    assert readable_text(CAT + BOX, [ITEM, same_size]) == "cat: (0, 0) to (100, 100)"


def test_without_an_image_the_numbers_are_thousandths() -> None:
    assert readable_text(CAT + BOX, []) == "cat: (0, 0) to (500, 250)"
