"""Layout: budgets, text sizes, measured text, the picture around a sheet."""

from __future__ import annotations

from random import Random

import pytest

from qwen2vl.synth.colors import sample_color
from qwen2vl.synth.compositing.layers import Composite, Ground, Rect, Text
from qwen2vl.synth.compositing.text import has_cached_glyphs, text_extent
from qwen2vl.synth.documents.layout import (
    Budget,
    Fact,
    Sheet,
    Style,
    distinct_colors,
    draw_frame,
    place_sheet,
    sample_budget,
    sample_style,
    shift_layer,
    text_size,
    text_width,
    write,
)
from qwen2vl.synth.spec import Mixture

FONT = "Cabin-Regular.otf"
STYLE = Style(
    ground=Ground(rgb=(0, 0, 90)),
    paper=(250, 250, 250),
    is_bare=False,
    ink=(0, 0, 0),
    font=FONT,
    bold=FONT,
    size=14,
)


def test_most_pictures_are_small_and_a_mixture_can_ask_for_large_ones() -> None:
    rng = Random(1)
    budgets = [sample_budget(rng, Mixture(picture_side=(64, 2000))) for _ in range(300)]
    small = sum(budget.area <= 340**2 for budget in budgets)
    assert 240 < small < 300
    assert max(budget.area for budget in budgets) > 1000**2
    for _ in range(50):
        budget = sample_budget(rng, Mixture(picture_side=(600, 900)))
        assert 600**2 <= budget.area <= 900**2 and budget.least <= budget.area
        assert sample_budget(rng, Mixture(picture_side=(64, 100))).area == 100**2


def test_a_budget_grows_narrow_pictures_to_its_aspect_ratio() -> None:
    budget = Budget(area=10_000, least=1, aspect=2.0, zoom=1.0)
    assert budget.grow(100, 30) == (100, 50)
    assert budget.grow(20, 20) == (28, 28)
    assert budget.admits(Sheet(width=140, height=10, layers=(), facts=()))
    assert not budget.admits(Sheet(width=150, height=10, layers=(), facts=()))


def test_the_sheet_lies_within_a_picture_of_the_budget() -> None:
    fact = Fact(task="screen_click", answer="OK button", box=(1, 2, 30, 20))
    text = write("OK", (1, 2, 30, 20), (0, 0, 0), font=FONT, size=14)
    layers = (Rect(rgb=(9, 9, 9), box=(0, 0, 120, 60)), text)
    sheet = Sheet(width=120, height=60, layers=layers, facts=(fact,))
    rng = Random(2)
    loose = 0
    for _ in range(200):
        budget = Budget(area=40_000, least=8_000, aspect=4.0, zoom=1.0)
        picture, (placed,) = place_sheet(rng, Mixture(), budget, STYLE, sheet)
        assert 0.97 * budget.least <= picture.width * picture.height <= budget.area
        assert 1 / 4.1 < picture.width / picture.height < 4.1
        paper, rect, placed_text = picture.layers
        assert isinstance(paper, Rect) and isinstance(rect, Rect) and isinstance(placed_text, Text)
        assert paper.box == rect.box
        x, y = rect.box[:2]
        assert 0 <= x <= picture.width - 120 and 0 <= y <= picture.height - 60
        assert placed.box == (x + 1, y + 2, x + 30, y + 20)
        assert (placed_text.x, placed_text.y) == (x + text.x, y + text.y)
        assert picture.blur <= 0.59
        loose += picture.width * picture.height > 20_000
    assert 0 < loose < 60


def test_text_shrinks_with_the_attempts_and_display_fonts_stay_legible() -> None:
    budget = Budget(area=100_000, least=1, aspect=4.0, zoom=1.0)
    mixture = Mixture(fonts="bundled")
    rng = Random(3)
    sizes = [
        max(sample_style(rng, mixture, budget, attempt=attempt).size for _ in range(100))
        for attempt in (0, 4)
    ]
    assert sizes[0] > 20 and sizes[1] < 14
    styles = [sample_style(rng, mixture, budget, light=0.9) for _ in range(200)]
    assert 120 < sum(style.is_light for style in styles) < 200
    assert any(style.is_bare for style in styles) and any(not style.is_bare for style in styles)
    assert all(style.paper == style.ground.rgb for style in styles if style.is_bare)
    bold = sum("Bold" in style.bold for style in styles if "Cabin" in style.font)
    assert 0 < bold < sum("Cabin" in style.font for style in styles)


@pytest.mark.parametrize("font", ["DejaVuSans.ttf", "Lato-Bold.ttf", "FreeSerif.ttf"])
def test_text_sizes_are_those_of_cached_glyphs(font: str) -> None:
    for size in (5, 11, 14, 20, 37, 90):
        nearest = text_size(size, font)
        assert has_cached_glyphs(font, nearest) and nearest >= 11
        assert abs(nearest - max(size, 11)) <= 8
    assert text_size(17, FONT) == 17 and text_size(5, FONT) == 11  # not a training font


def test_text_width_is_that_of_the_drawn_line() -> None:
    for text in ("Total", "12.50 kg", "WAVE"):
        for size in (11, 14, 23):
            left, _, right, _ = text_extent(text, FONT, size)
            width = text_width(text, FONT, size)
            assert right - left - 1 <= width <= right - left + 0.2 * size + 2


def test_lines_are_aligned_in_their_box() -> None:
    box = (10, 20, 110, 50)
    width = text_width("Total", FONT, 17)
    lines = {
        align: write("Total", box, (0, 0, 0), font=FONT, size=17, align=align)
        for align in ("left", "right", "center")
    }
    assert lines["left"].x == 10
    assert lines["right"].x == 110 - width
    assert lines["center"].x == 10 + (100 - width) // 2
    _, top, _, bottom = text_extent("Hx", FONT, 17)
    y = lines["left"].y
    assert abs((y + top - 20) - (50 - y - bottom)) <= 1


def test_a_frame_is_inside_of_its_box() -> None:
    frame = [layer for layer in draw_frame((5, 5, 15, 25), (1, 2, 3), 2) if isinstance(layer, Rect)]
    covered = {
        (x, y)
        for x1, y1, x2, y2 in (layer.box for layer in frame)
        for x in range(x1, x2)
        for y in range(y1, y2)
    }
    inner = {(x, y) for x in range(7, 13) for y in range(7, 23)}
    assert covered == {(x, y) for x in range(5, 15) for y in range(5, 25)} - inner


def test_colors_that_look_like_the_paper_are_left_out() -> None:
    rng = Random(4)
    for paper in ((255, 255, 255), (0, 0, 0), (170, 195, 150), (128, 128, 128)):
        names = distinct_colors(paper)
        assert len(names) >= 7
        for name in names:
            shade = sample_color(rng, name)
            assert max(abs(a - b) for a, b in zip(shade, paper, strict=True)) >= 55
    assert "white" not in distinct_colors((255, 255, 255))
    assert "black" not in distinct_colors((0, 0, 0))


def test_moving_a_layer_keeps_the_rest() -> None:
    text = Text(text="a", font=FONT, size=14, x=3, y=20, rgb=(1, 2, 3))
    moved = shift_layer(text, 10, 100)
    assert moved == Text(text="a", font=FONT, size=14, x=13, y=120, rgb=(1, 2, 3))
    picture = Composite(width=5, height=5, layers=(Rect(rgb=(1, 1, 1), box=(0, 0, 2, 2)),))
    assert shift_layer(picture.layers[0], 1, 2) == Rect(rgb=(1, 1, 1), box=(1, 2, 3, 4))
