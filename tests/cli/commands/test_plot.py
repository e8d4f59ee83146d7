"""`plot`: curves of the records of a run, overlaid runs, resumed runs, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen2vl.cli.chart import Panel
from qwen2vl.cli.commands import plot
from tests.cli.conftest import Run

Write = Callable[..., Path]


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
        "tokens_per_second": 900.0,
        "data_wait": 0.01,
        "families": families,
        **values,
    }


def evaluation(step: int, gain: float) -> dict[str, Any]:
    families = {"text": {"loss": 1.0, "vision_gain": gain}, "text_only": {"loss": 2.0}}
    found = {"loss": 1.5, "vision_gain": gain, "compared": 9, "families": families}
    return {"step": step, "held_out": found, "mini": {"shapes": {"accuracy": 0.5}}}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to(name: str, *lines: dict[str, Any]) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        return folder

    return to


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the arguments of draw_chart."""
    calls: list[Any] = []

    def draw_chart(title: str, subtitle: str, panels: list[Panel]) -> Image.Image:
        calls[:] = [title, subtitle, {panel.title: panel for panel in panels}]
        return Image.new("RGB", (2, 2))

    monkeypatch.setattr(plot, "draw_chart", draw_chart)
    return calls


def test_a_run_is_plotted_to_an_image(run: Run, write: Write, tmp_path: Path) -> None:
    write("a", *(training(i) for i in range(10, 60, 10)), evaluation(50, 0.1))
    result = run("plot", "a", "-o", "curves.png")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "curves.png\n"
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 1000
        assert len(image.getcolors(1 << 20) or ()) > 50


def test_one_run_is_plotted_with_its_families(run: Run, write: Write, drawn: list[Any]) -> None:
    write("a", training(10), training(20, mfu=0.4), evaluation(20, 0.1), training(30, "world"))
    run("plot", "a")
    title, subtitle, panels = drawn
    assert (title, subtitle) == ("a", "30 of 100 steps")
    assert list(panels) == [
        "Loss",
        "Held-out loss",
        "Vision gain",
        "Exact match",
        "Gradient norm",
        "Throughput",
        "MFU",
        "Waiting for data",
        "Mini suite",
    ]
    loss = {curve.name: curve for curve in panels["Loss"].curves}
    assert set(loss) == {"all", "shapes", "text"}
    assert loss["all"].points == [(10, 0.3), (20, 0.15), (30, 0.1)]
    assert panels["Loss"].marks == [(10, "see"), (30, "world")]
    gain = {curve.name: curve for curve in panels["Vision gain"].curves}
    assert set(gain) == {"all", "text"}
    assert gain["text"].color == loss["text"].color
    assert panels["MFU"].curves[0].points == [(20, 0.4)]


def test_several_runs_are_overlaid(run: Run, write: Write, drawn: list[Any]) -> None:
    write("a", training(10))
    write("b/a", training(10), training(40), evaluation(40, 0.2))
    run("plot", "a", "b/a/metrics.jsonl", "b/a")
    title, subtitle, panels = drawn
    assert (title, subtitle) == ("a 1, metrics, a 3", "40 steps")
    assert [curve.name for curve in panels["Loss"].curves] == ["a 1", "metrics", "a 3"]
    assert [curve.name for curve in panels["Vision gain"].curves] == ["metrics", "a 3"]
    assert len({curve.color for curve in panels["Loss"].curves}) == 3


def test_steps_repeated_after_a_resume_are_dropped(
    run: Run, write: Write, drawn: list[Any]
) -> None:
    lines = [training(10), training(20, loss=9.0), evaluation(20, 9.0), training(30, loss=9.0)]
    write("a", *lines, training(20, loss=1.0), evaluation(20, 1.0))
    run("plot", "a")
    assert drawn[2]["Loss"].curves[0].points == [(10, 0.3), (20, 1.0)]
    assert drawn[2]["Vision gain"].curves[0].points == [(20, 1.0)]


def test_reports_without_targets_are_skipped(run: Run, write: Write, drawn: list[Any]) -> None:
    write("a", training(10), training(20, loss=None, families={}), training(30))
    run("plot", "a")
    assert [step for step, _ in drawn[2]["Loss"].curves[0].points] == [10, 30]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: cannot be read: No such file"),
        (["empty"], "holds no report yet; the run writes one every logging_steps steps"),
        (["broken"], "broken/metrics.jsonl: line 2 is no line of metrics"),
        (["good", "-o", "x.pdf"], "-o x.pdf: give a name that ends in .png"),
        (["good", "-o", "no/where.png"], "-o no/where.png"),
        ([], "Missing argument 'RUN...'"),
    ],
)
def test_errors_are_one_line(run: Run, write: Write, arguments: list[str], message: str) -> None:
    write("empty")
    write("good", training(1))
    (write("broken", training(1)) / "metrics.jsonl").open("a").write("[1]\n")
    result = run("plot", *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line
