"""Training curves: what is read from metrics.jsonl, and what the axes of the figure show."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qwen2vl.cli import training_curves
from qwen2vl.cli.training_curves import INK, RunMetrics, build_figure, read_run
from qwen2vl.errors import InputError

Read = Callable[..., RunMetrics]


def training(step: int, stage: str = "see", **values: Any) -> dict[str, Any]:
    families = {
        "text": {"loss": 2.0 / step, "exact_match": 0.5},
        "shapes": {"loss": 1.0, "exact_match": 0.25},
    }
    return {
        "step": step,
        "steps": 100,
        "stage": stage,
        "loss": 3.0 / step,
        "grad_norm": 1.0,
        "lr": 1e-3 / step,
        "tokens_per_second": 900.0,
        "data_wait": 0.01,
        "families": families,
        **values,
    }


def evaluation(step: int, gain: float) -> dict[str, Any]:
    families = {"text": {"loss": 1.0, "vision_gain": gain}, "text_only": {"loss": 2.0}}
    found = {"loss": 1.5, "vision_gain": gain, "compared": 9, "families": families}
    return {"step": step, "held_out": found, "mini": {"shapes": {"accuracy": 0.5}}}


def write_run(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write a run and read it."""
    return lambda name, *records: read_run(write_run(tmp_path / name, *records))


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def curves(axes: Axes) -> dict[str, Line2D]:
    """Return the smoothed curves of a panel by name."""
    return {
        str(line.get_label()): line
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# Reading ----------------------------------------------------------------------------------------


def test_a_run_is_read_as_scalars_and_stages(read: Read, tmp_path: Path) -> None:
    run = read("a", training(10), evaluation(10, 0.1), training(20, "world", mfu=0.4))
    assert run.name == "a"
    assert run.scalars["loss"] == [(10, 0.3), (20, 0.15)]
    assert run.scalars["families/text/loss"] == [(10, 0.2), (20, 0.1)]
    assert run.scalars["held_out/vision_gain"] == [(10, 0.1)]
    assert run.scalars["mfu"] == [(20, 0.4)]
    assert run.stages == {"see": 10, "world": 20}
    assert read_run(tmp_path / "a" / "metrics.jsonl") == run._replace(name="metrics")


def test_steps_repeated_after_a_resume_are_dropped(read: Read) -> None:
    records = [training(10), training(20, loss=9.0), evaluation(20, 9.0), training(30, loss=9.0)]
    scalars = read("a", *records, training(20, loss=1.0), evaluation(20, 1.0)).scalars
    assert scalars["loss"] == [(10, 0.3), (20, 1.0)]
    assert scalars["held_out/vision_gain"] == [(20, 1.0)]
    assert scalars["step"][-1] == (20, 20)


def test_the_last_report_keeps_the_evaluation_of_its_step(read: Read) -> None:
    scalars = read("a", training(5), evaluation(8, 0.5), training(8)).scalars
    assert scalars["held_out/vision_gain"] == [(8, 0.5)]
    assert [step for step, _ in scalars["loss"]] == [5, 8]


def test_reports_without_targets_and_infinite_values_are_skipped(read: Read) -> None:
    empty = training(20, loss=None, families={})
    scalars = read("a", training(10), empty, training(30, grad_norm=float("inf"))).scalars
    assert [step for step, _ in scalars["loss"]] == [10, 30]
    assert [step for step, _ in scalars["grad_norm"]] == [10]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([], "holds no report yet"),
        ([None], "none of its 1 reports has targets"),
        (
            [float("nan"), float("inf"), None],
            "losses of its 3 reports is finite; training",
        ),
    ],
)
def test_the_error_says_why_there_is_no_loss(
    read: Read, losses: list[float | None], message: str
) -> None:
    records = [training(i, loss=loss, families={}) for i, loss in enumerate(losses, 1)]
    with pytest.raises(InputError, match=message):
        read("a", *records, evaluation(9, 0.1))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"step": 10, "loss": 1.0}, "line 2 has no 'steps'"),
        ({"steps": 10, "loss": 1.0}, "line 2 has no 'step'"),
        ({"step": float("inf"), "steps": 10, "loss": 1.0}, "line 2 is no line of metrics"),
        ({"step": 10, "steps": None, "loss": 1.0}, "line 2 is no line of metrics"),
    ],
)
def test_a_record_without_its_steps_is_an_error(
    read: Read, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read("a", training(5), record)


# Drawing ----------------------------------------------------------------------------------------


def test_one_run_is_drawn_with_its_families_and_stages(read: Read) -> None:
    records = [training(10), training(20, mfu=0.4), evaluation(20, 0.1), training(30, "world")]
    figure = build_figure([read("a", *records)])
    assert figure.get_suptitle() == "a: 30 of 100 steps"
    axes = panels(figure)
    assert list(axes) == [
        "Loss",
        "Validation loss",
        "Vision gain",
        "Exact match",
        "Mini suite",
        "Gradient norm",
        "Learning rate",
        "Throughput",
        "MFU",
        "Waiting for data",
    ]
    loss, gain = curves(axes["Loss"]), curves(axes["Vision gain"])
    assert set(loss) == {"all", "shapes", "text"}
    assert points(loss["all"]) == [(10, 0.3), (20, 0.15), (30, 0.1)]
    assert loss["all"].get_color() == INK
    assert set(gain) == {"text"}  # equal to that of all
    assert gain["text"].get_color() == loss["text"].get_color() != loss["shapes"].get_color()
    assert points(curves(axes["MFU"])["all"]) == [(20, 0.4)]
    assert points(curves(axes["Learning rate"])["all"]) == [(10, 1e-4), (20, 5e-5), (30, 1e-3 / 30)]
    assert {"see", "world"} < set(texts(axes["Loss"]))
    assert all(panel.get_xlim() == (0, 30) for panel in axes.values())


def test_the_only_family_of_a_run_is_drawn_once(read: Read) -> None:
    mine = {"mine": {"loss": 0.3 + 1e-9, "exact_match": 0.5}}
    axes = panels(build_figure([read("a", training(10, loss=0.3, families=mine))]))
    assert set(curves(axes["Loss"])) == {"mine"}
    other = {"mine": {"loss": 0.4, "exact_match": 0.5}}
    axes = panels(build_figure([read("b", training(10, loss=0.3, families=other))]))
    assert set(curves(axes["Loss"])) == {"all", "mine"}


def test_curves_are_labeled_with_their_last_value(read: Read) -> None:
    axes = panels(build_figure([read("a", training(10, tokens_per_second=12345.0))]))
    assert texts(axes["Loss"]) == ["text 0.2", "all 0.3", "shapes 1"]
    assert texts(axes["Exact match"]) == ["shapes 25%", "text 50%"]
    assert texts(axes["Throughput"]) == ["12.3k"]
    colors = {text.get_text(): text.get_color() for text in axes["Loss"].texts}
    assert colors["all 0.3"] == INK
    assert colors["text 0.2"] == curves(axes["Loss"])["text"].get_color()


def test_several_runs_are_overlaid_without_families(read: Read) -> None:
    runs = [read("a", training(10)), read("b/a", training(10), training(40), evaluation(40, 0.2))]
    figure = build_figure(runs)
    assert figure.get_suptitle() == "2 runs: 40 of 100 steps"
    axes = panels(figure)
    assert set(axes) & {"Exact match", "Mini suite"} == set()
    loss, gain = curves(axes["Loss"]), curves(axes["Vision gain"])
    assert set(loss) == {"1 a", "2 a"}
    assert len({line.get_color() for line in loss.values()}) == 2
    assert gain["2 a"].get_color() == loss["2 a"].get_color()
    assert texts(axes["Vision gain"]) == ["2 a 0.2"]


def test_only_runs_of_the_same_name_are_numbered(read: Read) -> None:
    runs = [read(name, training(10)) for name in ("a", "b", "c/a")]
    loss = curves(panels(build_figure(runs))["Loss"])
    assert set(loss) == {"1 a", "b", "3 a"}


def test_long_curves_are_smoothed_in_front_of_their_values(read: Read) -> None:
    noise = np.random.default_rng(0).normal(5, 1, size=1000)
    records = [training(i, loss=float(v), families={}) for i, v in enumerate(noise, 1)]
    raw, smoothed = panels(build_figure([read("a", *records)]))["Loss"].get_lines()
    assert np.array_equal(np.asarray(raw.get_ydata()), noise)
    assert raw.get_alpha() == 0.2
    values = np.asarray(smoothed.get_ydata())
    assert len(values) == 1000
    assert np.std(values) < 0.3
    assert abs(values.mean() - 5) < 0.1


def test_a_constant_curve_stays_constant_when_smoothed() -> None:
    assert np.allclose(training_curves._smooth(np.full(500, 3.0)), 3)


def test_few_points_get_markers(read: Read) -> None:
    records = [training(i) for i in range(1, 100)]
    axes = panels(build_figure([read("a", *records, evaluation(99, 0.5))]))
    assert curves(axes["Validation loss"])["all"].get_marker() == "o"
    assert curves(axes["Loss"])["all"].get_marker() == ""


def test_outliers_of_a_long_run_are_cut_off() -> None:
    assert training_curves._limits([1000.0, 500.0] + [1.0] * 500)[1] < 2
    assert training_curves._limits([1000.0, 1.0])[1] > 1000


@pytest.mark.parametrize(("values", "low"), [([8, 9], 8), ([1, 9], 0), ([-1, 1], -1)])
def test_the_y_axis_starts_at_zero_unless_all_values_are_far_from_it(
    values: list[float], low: float
) -> None:
    bottom, top = training_curves._limits(values)
    assert bottom == pytest.approx(low, abs=0.05 * (top - bottom))
    assert bottom < low


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-3.0, -3.0], [1e-9, 3e12], [1, -1] * 999])
def test_degenerate_values_are_drawn(read: Read, values: list[float]) -> None:
    records = [training(i, loss=value, data_wait=value) for i, value in enumerate(values, 1)]
    figure = build_figure([read("a", *records)])
    figure.draw_without_rendering()
    bottom, top = panels(figure)["Loss"].get_ylim()
    assert bottom < min(values) <= max(values) < top


@given(st.lists(st.floats(-1, 2), min_size=1, max_size=20))
def test_labels_do_not_overlap(heights: list[float]) -> None:
    placed = training_curves._spread(np.sort(heights))
    gap = min(training_curves.LABEL_HEIGHT, training_curves.MAX_HEIGHT / len(heights))
    assert all(b - a > 0.95 * gap for a, b in pairwise(placed))
    assert placed.min() > -0.01
    assert placed.max() <= training_curves.MAX_HEIGHT + 0.01


def test_names_of_short_stages_are_left_out(read: Read) -> None:
    stages = {1: "words", 3: "see", 5: "cells", 50: "world"}
    records = [training(step, stage) for step, stage in stages.items()]
    axes = panels(build_figure([read("a", *records, training(100, "world"))]))["Gradient norm"]
    assert texts(axes) == ["1", "words", "world"]
    positions = [line.get_xdata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 2]
    assert positions == list(stages)


def test_a_run_of_one_stage_has_no_marks(read: Read) -> None:
    axes = panels(build_figure([read("a", training(10), training(20))]))["Gradient norm"]
    assert texts(axes) == ["1"]
    assert len(axes.get_lines()) == 2


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [(0.5, False, "0.5"), (1500, False, "1.5k"), (2e6, False, "2M"), (0, False, "0")]
    + [(0.25, True, "25%"), (0.07, True, "7%")],
)
def test_ticks_are_short(value: float, percent: bool, text: str) -> None:
    assert training_curves._format(value, percent=percent) == text


def test_colors_are_distinct() -> None:
    colors = {to_hex(color) for color in (*training_curves.COLORS, INK)}
    assert len(colors) == len(training_curves.COLORS) + 1
