"""`demo`: pictures and a clip appear, answers beside the truth, and the way to one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

# Imported before `find` is replaced below: what they import by name then stays the real one.
import qwen2vl.engine.llm
import qwen2vl.train.init  # noqa: F401
from qwen2vl.errors import CheckpointError
from tests.cli.conftest import Run


def test_the_demo_draws_asks_and_shows_the_truth(run: Run, tiny_folder: Path) -> None:
    result = run("demo", "--model", tiny_folder, "-o", "shown")
    assert result.exit_code == 0, result.stderr
    written = sorted(path.name for path in Path("shown").iterdir())
    assert any(name.startswith("shapes_") for name in written)
    for name in written:
        with Image.open(Path("shown") / name) as picture:
            picture.load()
            assert min(picture.size) > 1
    assert "truth" in result.stdout
    assert "answers are right." in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Try your own: qwen2vl ask --image")


def test_an_untrained_model_says_that_its_answers_mean_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: object) -> None:
        raise CheckpointError("no nano here")

    monkeypatch.setattr("qwen2vl.weights.find", missing)
    result = run("demo")
    assert result.exit_code == 0, result.stderr
    assert "qwen2vl: no trained nano is installed: random weights answer" in result.stderr
    assert "no nano here" not in result.stderr
    assert "These answers mean nothing" in result.stdout
    assert "answers are right" not in result.stdout


def test_a_damaged_nano_is_an_error_and_not_replaced(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{")
    monkeypatch.setattr("qwen2vl.weights.find", lambda _: tmp_path)
    result = run("demo")
    assert result.exit_code != 0
    assert "config.json" in result.stderr
    assert "mean nothing" not in result.stdout


def test_a_missing_model_that_was_asked_for_is_an_error(run: Run) -> None:
    result = run("demo", "--model", "nowhere")
    assert result.exit_code == 1
    assert "no such folder" in result.stderr


def test_a_folder_that_cannot_be_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = run("demo", "-o", "file/inside")
    assert result.exit_code == 2
    assert "cannot be made a folder" in result.stderr
