"""Boxes drawn on images and frames: outlines, places of labels, sizes, file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from qwen2vl.cli import annotate
from qwen2vl.cli.annotate import annotated_image, draw_shapes
from qwen2vl.cli.boxes import PixelShape
from qwen2vl.errors import InputError

Labels = list[tuple[int, int, int, int]]


def box(phrase: str, *numbers: float) -> PixelShape:
    return PixelShape(phrase=phrase, corners=tuple(zip(numbers[::2], numbers[1::2], strict=True)))


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> Labels:
    """Record the rectangles of the labels that are drawn."""
    drawn: Labels = []
    draw = annotate._draw_label

    def record(pen: Any, text: str, label: Any, color: str, font: Any) -> None:
        drawn.append((label.left, label.top, label.right, label.bottom))
        draw(pen, text, label, color, font)

    monkeypatch.setattr(annotate, "_draw_label", record)
    return drawn


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
    draw_shapes(image, [box("x" * 50, 0.0, 0.0, 29.97, 29.97)])
    assert image.getpixel((0, 15)) != (255, 255, 255)


@pytest.mark.parametrize(
    ("size", "numbers"),
    [
        ((448, 448), (100, 100, 300, 300)),
        ((448, 448), (0, 0, 200, 200)),  # no space above
        ((448, 448), (100, 0, 300, 448)),  # neither above nor below
        ((448, 448), (300, 300, 448, 448)),
        ((3000, 2000), (2900, 900, 2990, 1000)),
        ((600, 200), (0, 0, 300, 200)),
    ],
)
def test_a_label_covers_no_part_of_its_object(
    labels: Labels, size: tuple[int, int], numbers: tuple[int, ...]
) -> None:
    draw_shapes(Image.new("RGB", size), [box("red square", *numbers)])
    ((left, top, right, bottom),) = labels
    assert left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]
    assert right <= numbers[0] or left >= numbers[2] or bottom <= numbers[1] or top >= numbers[3], (
        "it is beside the box"
    )
    near = max(numbers[0] - right, left - numbers[2], numbers[1] - bottom, top - numbers[3])
    assert near <= max(size) / 50
    assert 13 <= bottom - top <= max(20, max(size) / 20), "it can be read"


def test_labels_cover_neither_each_other_nor_other_boxes(labels: Labels) -> None:
    shapes = [
        box("cat", 20, 30, 200, 180),
        box("dog with a red hat", 150, 100, 400, 300),
        box("ball", 60, 330, 110, 380),
        box("second ball", 64, 384, 114, 430),
        box("everything", 1, 1, 447, 447),
    ]
    draw_shapes(Image.new("RGB", (448, 448)), shapes)
    canvas = np.zeros((448, 448), int)
    for left, top, right, bottom in labels:
        canvas[int(np.ceil(top)) : int(bottom), int(np.ceil(left)) : int(right)] += 1
    assert canvas.max() == 1, "no label covers another"
    for shape in shapes[2:4]:
        (left, top), (right, bottom) = shape.corners
        assert not canvas[int(top) : int(bottom), int(left) : int(right)].any()


@given(
    st.lists(st.tuples(*4 * [st.integers(0, 999)]), min_size=1, max_size=6),
    st.sampled_from([(5, 400), (84, 84), (448, 300)]),
    st.text(max_size=60),
)
def test_any_boxes_and_phrases_are_drawn(
    rows: list[tuple[int, ...]], size: tuple[int, int], phrase: str
) -> None:
    shapes = [
        box(
            phrase,
            min(x1, x2) * size[0] / 1000,
            min(y1, y2) * size[1] / 1000,
            max(x1, x2) * size[0] / 1000,
            max(y1, y2) * size[1] / 1000,
        )
        for x1, y1, x2, y2 in rows
    ]
    image = annotated_image(Image.new("RGB", size, "white"), shapes)
    assert image.getextrema() != ((255, 255),) * 3


def test_a_small_image_is_enlarged_with_its_boxes() -> None:
    image = annotated_image(Image.new("RGB", (84, 42), "white"), [box("a", 21, 11, 63, 31)])
    assert image.size == (84 * 6, 42 * 6)
    assert image.getpixel((21 * 6, 20 * 6)) != (255, 255, 255)
    assert image.getpixel((42 * 6, 20 * 6)) == (255, 255, 255)
    assert annotated_image(Image.new("RGB", (84, 42)), []).size == (84, 42)
    assert annotated_image(Image.new("RGB", (300, 42)), [box("a", 1, 1, 9, 9)]).size == (300, 42)


@pytest.mark.parametrize(
    ("output", "names", "paths"),
    [
        ("out.png", ["a.jpg"], ["out.png"]),
        ("out.png", ["a.jpg", "b.gif"], ["out-1.png", "out-2.png"]),
        ("x.y/out.b.jpg", ["a", "b"], ["x.y/out.b-1.jpg", "x.y/out.b-2.jpg"]),
        ("folder", ["a.jpg", "b.gif"], ["folder/a.png", "folder/b.png"]),
        ("folder", ["a.jpg", "a.png"], ["folder/a-1.png", "folder/a-2.png"]),
    ],
)
def test_names_of_the_written_images(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    names: list[str],
    paths: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    items: Any = [type("Named", (), {"name": name}) for name in names]
    assert annotate._output_paths(output, items) == paths


@pytest.mark.parametrize(
    ("output", "count", "message"),
    [
        ("out.png", 0, "got none"),
        ("out.txt", 1, "ends in"),
        ("no/folder/", 1, "no does not exist"),
        ("no/out.png", 2, "does not exist"),
    ],
)
def test_an_unusable_output_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, count: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        annotate.check_output(output, count)
