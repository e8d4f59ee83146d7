"""`demo`: written images, the table of answers, and behavior without nano."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

# Imported before `resolve_model` is replaced below: these modules keep the real one.
import qwen2vl.engine.llm
import qwen2vl.train.init  # noqa: F401
from qwen2vl.cli.commands import demo
from qwen2vl.errors import CheckpointError
from tests.cli.conftest import Run
from tests.fonts import hide_system_fonts


def test_the_demo_writes_images_and_prints_the_truth(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_system_fonts(monkeypatch)
    result = run("demo", "--model", tiny_folder, "-o", "shown")
    assert result.exit_code == 0, result.stderr
    written = sorted(path.name for path in Path("shown").iterdir())
    assert any(name.startswith("text_") for name in written)
    assert any(name.startswith("shapes_") for name in written)
    for name in written:
        with Image.open(Path("shown") / name) as image:
            image.load()
            assert min(image.size) > 1
    assert "truth" in result.stdout
    assert "answers are right." in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Try your own: qwen2vl ask photo.png")


def test_the_next_command_has_a_path_unless_the_shell_finds_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", [str(Path.cwd() / ".venv" / "bin" / "qwen2vl"), "demo"])
    monkeypatch.setenv("PATH", "")
    assert demo._program_name() == str(Path(".venv", "bin", "qwen2vl"))
    monkeypatch.setattr("shutil.which", lambda _: "/bin/qwen2vl")
    assert demo._program_name() == "qwen2vl"


def test_without_nano_an_untrained_model_answers_with_a_note(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: object) -> None:
        raise CheckpointError("no nano here")

    monkeypatch.setattr("qwen2vl.weights.resolve_model", missing)
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
    monkeypatch.setattr("qwen2vl.weights.resolve_model", lambda _: tmp_path)
    result = run("demo")
    assert result.exit_code != 0
    assert "config.json" in result.stderr
    assert "mean nothing" not in result.stdout


def test_a_missing_model_is_an_error(run: Run) -> None:
    result = run("demo", "--model", "nowhere")
    assert result.exit_code == 2
    assert "no such folder" in result.stderr


def test_an_adapter_with_a_name_is_refused(run: Run) -> None:
    for arguments in (["demo"], ["eval"]):
        result = run(*arguments, "--adapter", "a=folder")
        assert result.exit_code == 2
        assert "--adapter a=...: this command uses one adapter" in result.stderr


def test_an_invalid_output_folder_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = run("demo", "-o", "file/inside")
    assert result.exit_code == 2
    assert "cannot be made a folder" in result.stderr
