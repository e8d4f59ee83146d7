"""The command that writes the results page: runs, merging of scores, and the page itself."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.eval.runner.toy import ToyAnswerer, ToySuite

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def command() -> Any:
    return import_module("suites")


@pytest.fixture
def page() -> Any:
    return import_module("harness.suite_page")


@pytest.fixture
def runs() -> Any:
    return import_module("harness.suite_runs")


def toy_run(runs: Any, answerer: ToyAnswerer, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        **{"name": "toy", "column": "toy", "identity": {"name": "toy"}, "parts": ("word",)},
        "open_answerer": lambda part: answerer,
    }
    return runs.SuiteRun(**{**fields, **changes})


def row(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        **{"suite": "lines", "digest": "d", "part": "latin", "column": "nano", "run": "nano"},
        **{"metric": "accuracy", "score": 0.5, "interval": [0.4, 0.6], "chance": 0.25},
        **{"num_examples": 1200, "limit": None, "prompt_tokens": None, "refusals": None},
        "calibration_error": None,
    }
    return {**fields, **changes}


def test_a_run_is_scored_by_part_and_continued(runs: Any, tmp_path: Path) -> None:
    first, second = ToyAnswerer(), ToyAnswerer()
    (scored,) = runs.execute(ToySuite(), toy_run(runs, first), tmp_path)
    assert (scored.part, scored.num_examples, scored.limit) == ("word", 120, None)
    assert scored.score == pytest.approx(1 - 18 / 120, abs=0.02)
    assert runs.execute(ToySuite(), toy_run(runs, second), tmp_path) == [scored]
    assert first.batches and not second.batches


def test_a_run_of_some_parts_has_no_row_of_all(runs: Any, tmp_path: Path) -> None:
    class TwoParts(ToySuite):
        parts = ("word", "text", "none")

    rows = runs.execute(TwoParts(), toy_run(runs, ToyAnswerer()), tmp_path)
    assert [one.part for one in rows] == ["word"]
    blind = toy_run(runs, ToyAnswerer(), name="blind", blind=True)
    (control,) = runs.execute(ToySuite(), blind, tmp_path)
    assert control.limit == pytest.approx(0.182, abs=0.01)  # 0.1 and 3 sigma of 120


def test_scores_of_other_items_are_dropped(command: Any) -> None:
    kept = [row(), row(run="tesseract-1x"), row(suite="clips", part="order")]
    new = [row(digest="e", score=0.75)]
    merged = command.merge_rows(kept, new)
    assert [(r["suite"], r["run"], r["score"]) for r in merged] == [
        ("lines", "nano", 0.75),
        ("clips", "nano", 0.5),
    ]
    assert command.merge_rows(kept, [row(run="tesseract-1x", score=0.1)])[1]["score"] == 0.1


def test_the_better_scale_of_a_peer_is_shown(page: Any) -> None:
    error_rate = {"metric": "character error rate", "column": "Tesseract"}
    rows = [
        row(metric="character error rate", score=0.2, prompt_tokens=31.2),
        row(**error_rate, run="tesseract-1x", score=0.031, interval=[0.02, 0.04]),
        row(**error_rate, run="tesseract-2x", score=0.042, interval=[0.03, 0.05]),
    ]
    lines = page.render_page(rows).splitlines()
    assert "| part (character error rate) | items | prompt tokens | nano | Tesseract |" in lines
    assert "| `latin` | 1,200 | 31 | 20.0 (40.0 - 60.0) | 3.1 (2.0 - 4.0) |" in lines


def test_the_control_stands_beside_chance(page: Any) -> None:
    rows = [row(), row(column="blind", run="nano-blind", score=0.24, limit=0.28)]
    assert (
        "| `latin` | 1,200 | 50.0 (40.0 - 60.0) | 25.0 | 24.0 | 28.0 |"
        in page.render_page(rows).splitlines()
    )


def test_the_page_is_written_from_the_scores(command: Any, page: Any) -> None:
    rows = json.loads((ROOT / "benchmarks" / "suites.json").read_text(encoding="utf-8"))
    assert command.load_rows() == rows
    assert (ROOT / page.PAGE).read_text(encoding="utf-8") == page.render_page(rows)
