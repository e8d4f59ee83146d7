"""Charts: curves are drawn at their values, labels do not overlap, ticks are round numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.cli import chart
from qwen2vl.cli.chart import COLORS, Curve, Panel, draw_chart


def curve(points: list[tuple[float, float]], name: str = "a", **options: bool) -> Curve:
    return Curve(name=name, points=points, color=COLORS[0], **options)


def panel(*curves: Curve, **options: bool) -> Panel:
    return Panel(title="Loss", note="nats", curves=curves, **options)


def inked(pixels: np.ndarray, color: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of a color in the plot area of the first panel: (rows, columns)."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    top, left = chart.MARGIN + chart.HEADER + chart.TOP, chart.MARGIN + chart.LEFT
    bottom = chart.MARGIN + chart.HEADER + chart.HEIGHT - chart.BOTTOM
    right = chart.MARGIN + chart.WIDTH - chart.LABELS
    inside = pixels[top - 2 : bottom + 3, left : right + 1].astype(int)
    return np.nonzero(np.abs(inside - wanted).sum(2) < 60)


def test_a_curve_rises_where_its_values_do() -> None:
    image = draw_chart("run", "of today", [panel(curve([(0, 0.0), (50, 0.5), (100, 1.0)]))])
    rows, columns = inked(np.asarray(image), COLORS[0])
    assert np.corrcoef(rows, columns)[0, 1] < -0.99
    assert columns.min() < 5
    assert columns.max() > chart.WIDTH - chart.LEFT - chart.LABELS - 5
    assert rows.max() - rows.min() > 0.9 * (chart.HEIGHT - chart.TOP - chart.BOTTOM)


@pytest.mark.parametrize(("panels", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 2, 3)])
def test_the_image_contains_all_panels(panels: int, columns: int, rows: int) -> None:
    image = draw_chart("run", "", [panel(curve([(1, 1.0), (2, 2.0)]))] * panels)
    assert image.size == (
        2 * chart.MARGIN + columns * chart.WIDTH,
        chart.MARGIN + chart.HEADER + rows * chart.HEIGHT,
    )


@pytest.mark.parametrize(
    "points",
    [
        [(5, 1.0)],
        [(1, 0.0), (2, 0.0)],
        [(1, -3.0), (2, -3.0)],
        [(1, 1e-9), (2, 3e12)],
        [(i, 1.0 if i % 2 else -1.0) for i in range(2000)],
    ],
)
@pytest.mark.parametrize("smooth", [True, False])
def test_degenerate_values_are_drawn(points: list[tuple[float, float]], smooth: bool) -> None:
    draw_chart("run", "", [panel(curve(points, smooth=smooth), percent=True)])


def test_initial_outliers_of_a_long_run_are_cut_off() -> None:
    values = [1000.0, 500.0] + [1.0] * 500
    axes = chart._fit_axes(panel(curve(list(enumerate(values)))))
    assert axes.y_high == 1.0
    short = chart._fit_axes(panel(curve([(0, 1000.0), (1, 1.0)])))
    assert short.y_high == 1000.0


@pytest.mark.parametrize(
    ("values", "from_zero", "low"),
    [([8.0, 9.0], True, 0), ([8.0, 9.0], False, 8), ([1, 9], False, 0)],
)
def test_the_y_axis_starts_at_zero_unless_from_zero_is_false(
    values: list[float], from_zero: bool, low: float
) -> None:
    axes = chart._fit_axes(panel(curve(list(enumerate(values))), from_zero=from_zero))
    assert axes.y_low == low


def test_smoothing_keeps_the_ends_and_reduces_noise() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    shown = chart._smoothed_points(curve([(i, float(v)) for i, v in enumerate(noise)]))
    assert (shown[0][0], shown[-1][0]) == (0, 999)
    assert len(shown) <= chart.MAX_SMOOTHED_POINTS + 1
    assert np.std([value for _, value in shown]) < 0.3
    points = [(1.0, 5.0), (2.0, 7.0)]
    assert chart._smoothed_points(curve(points, smooth=False)) == points


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_labels_do_not_overlap(heights: list[float]) -> None:
    placed = [h for h, _ in chart._spread_labels([(h, curve([(0, 0.0)])) for h in heights])]
    assert all(b - a > chart.LINE_HEIGHT - 0.2 for a, b in pairwise(placed))
    assert min(placed) >= chart.TOP - 0.1
    assert max(placed) <= chart.HEIGHT - chart.BOTTOM + 0.1


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside_the_range(low: float, width: float) -> None:
    ticks = chart._ticks(low, low + width, 4)
    assert 1 <= len(ticks) <= 6
    slack = 1e-6 * max(width, abs(low))
    assert all(low - slack <= tick <= low + width + slack for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (1500, "1.5k"), (2e6, "2M"), (3e12, "3T"), (0, "0")]
)
def test_tick_labels_are_short(value: float, text: str) -> None:
    assert chart._format_tick(value) == text
