"""`init`: two folders become one that a run starts from, or a line that says why not."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run
from tests.donors import write_open_clip, write_text


def test_two_donors_become_a_model_that_answers(run: Run, tmp_path: Path, picture: Path) -> None:
    write_text(tmp_path / "text")
    write_open_clip(tmp_path / "vision")
    result = run("init", "--text", "text", "--vision", "vision", "-o", "start")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "model: start (2 blocks of width 64 see, 2 of width 64 speak)",
        "fresh: the merger, and the rows of special tokens that the donor did not have",
        "try:   qwen2vl train stage1_vision model=start data=FILE.jsonl",
    ]
    answer = run("ask", "--model", "start", "--image", picture, "Hi", "--max-tokens", 2)
    assert answer.exit_code == 0, answer.output


def test_donors_in_the_wrong_places(run: Run, tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    result = run("init", "--text", "text", "--vision", "text", "-o", "start")
    assert result.exit_code == 1
    assert "model_type is 'qwen2', expected 'clip'" in result.stderr
    assert not (tmp_path / "start").exists()


def test_a_donor_is_missing(run: Run) -> None:
    result = run("init", "--text", "text", "-o", "start")
    assert result.exit_code == 2
    assert "Missing option '--vision'" in result.stderr
