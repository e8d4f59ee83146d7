"""`demo`: pictures and a clip appear, answers beside the truth, and the way to one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qwen2vl.cli import options
from qwen2vl.cli.demo import is_right
from qwen2vl.errors import CheckpointError
from qwen2vl.synth.spec import Example, Question, Spec
from tests.cli.conftest import Run


def box_text(x1: int, y1: int, x2: int, y2: int) -> str:
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


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

    monkeypatch.setattr(options, "open_model", missing)
    result = run("demo")
    assert result.exit_code == 0, result.stderr
    assert "no nano here" in result.stderr
    assert "These answers mean nothing" in result.stdout


QUESTIONS = {
    "text": [("Ab 1", "Ab 1\n", True), ("Ab 1", "ab 1", False)],
    "shapes": [("red circle", "A red circle.", True), ("3", "4", False)],
    "grounding": [
        (box_text(100, 100, 500, 500), box_text(110, 90, 510, 480), True),
        (box_text(100, 100, 500, 500), box_text(600, 600, 700, 700), False),
        (box_text(100, 100, 500, 500), "no box", False),
    ],
}


@pytest.mark.parametrize(
    ("family", "truth", "answer", "right"),
    [(family, *row) for family, rows in QUESTIONS.items() for row in rows],
)
def test_what_counts_as_right(family: str, truth: str, answer: str, right: bool) -> None:
    question = Question(task="any", text="?", answer=truth)
    spec = Spec(family=family, seed=0, index=0, questions=(question,))
    assert is_right(answer, Example(messages=[], truth=(question,), spec=spec)) == right


def test_a_missing_model_that_was_asked_for_is_an_error(run: Run) -> None:
    result = run("demo", "--model", "nowhere")
    assert result.exit_code == 1
    assert "no such folder" in result.stderr


def test_a_folder_that_cannot_be_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = run("demo", "-o", "file/inside")
    assert result.exit_code == 2
    assert "cannot be made a folder" in result.stderr
