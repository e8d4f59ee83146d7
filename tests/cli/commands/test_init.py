"""`init`: initialization from a Qwen2 and a CLIP folder, and one-line errors."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run
from tests.source_models import write_open_clip, write_qwen2


def test_two_source_models_become_a_working_model(
    run: Run, tmp_path: Path, image_file: Path
) -> None:
    write_qwen2(tmp_path / "text")
    write_open_clip(tmp_path / "vision")
    result = run("init", "--text", "text", "--vision", "vision", "-o", "start")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "model: start (vision tower: 2 blocks of width 64; language model: 2 layers of width 64)",
        "newly initialized: the merger, and embeddings of missing special tokens",
        "try:   qwen2vl train stage1_vision model=start data=FILE.jsonl",
    ]
    answer = run("ask", "--model", "start", "--image", image_file, "Hi", "--max-tokens", 2)
    assert answer.exit_code == 0, answer.output


def test_a_language_model_is_no_vision_tower(run: Run, tmp_path: Path) -> None:
    write_qwen2(tmp_path / "text")
    result = run("init", "--text", "text", "--vision", "text", "-o", "start")
    assert result.exit_code == 2
    assert "model_type is 'qwen2', expected 'clip'" in result.stderr
    assert not (tmp_path / "start").exists()


def test_a_missing_option(run: Run) -> None:
    result = run("init", "--text", "text", "-o", "start")
    assert result.exit_code == 2
    assert "Missing option '--vision'" in result.stderr
