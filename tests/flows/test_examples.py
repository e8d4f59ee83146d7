"""The examples run as written, and nano's printed answers are right."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

from qwen2vl.synth import Mixture, sample
from tests.folders import write_tiny

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
HAS_NANO = (ROOT / "qwen2vl" / "nano" / "config.json").is_file()

# Example -> how each printed line begins, by what the example draws.
ANSWERS = {
    "01_ask": ["What color is the shape? red"],
    "02_video": ["Which way does the shape move? right"],
    "03_grounding": ["Where is the red circle? <|object_ref_start|>red circle<|object_ref_end|>"],
    "04_batch": [
        "How many shapes are there? 2",
        "List the shapes. red circle, blue square",
        "Is there a green circle? no",
    ],
    "05_async": [
        "What do you see? blue circle",
        "What do you see? purple circle",
        "What do you see? red circle",
    ],
    "06_readme_picture": [],  # compared with the samples' own truth below
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a tiny random model, the MODEL argument where nano is not shipped."""
    folder = tmp_path_factory.mktemp("examples") / "tiny"
    write_tiny(folder)
    return str(folder)


def run(
    path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """Run an example from the command line; return the lines it printed."""
    monkeypatch.setattr("sys.argv", [str(path), model])
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def example(name: str) -> Path:
    return ROOT / "examples" / f"{name}.py"


def test_there_are_examples() -> None:
    assert [path.stem for path in EXAMPLES] == list(ANSWERS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_with_any_model(
    path: Path,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(path, tiny, monkeypatch, capsys), "it prints questions and answers"


@pytest.mark.skipif(not HAS_NANO, reason="needs the trained nano")
@pytest.mark.parametrize("name", [name for name in ANSWERS if ANSWERS[name]])
def test_the_printed_answers_are_right(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = run(example(name), "nano", monkeypatch, capsys)
    if name == "05_async":  # in any order, and with the pieces as they were streamed
        lines = sorted(line.replace("|", "") for line in lines)
    assert len(lines) >= len(ANSWERS[name])
    for line, answer in zip(lines, ANSWERS[name], strict=False):
        assert line.startswith(answer), line
        assert re.fullmatch(r"[^\w]*(?: ?\(.*\)|<\|box_start\|>.*)", line.removeprefix(answer))


@pytest.mark.skipif(not HAS_NANO, reason="needs the trained nano")
def test_the_box_lies_on_the_circle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    *_, line = run(example("03_grounding"), "nano", monkeypatch, capsys)
    box = [int(number) for number in re.findall(r"\d+", line)]
    assert box == pytest.approx([10, 22, 45, 57], abs=3)
    with Image.open("boxes.png") as image:
        assert image.getpixel((box[0], 40)) == (0, 0, 0), "the box is drawn"
        assert image.getpixel((28, 40)) == (255, 0, 0), "the red disc is still there"


@pytest.mark.skipif(not HAS_NANO, reason="needs the trained nano")
def test_the_picture_of_the_readme_has_right_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = run(example("06_readme_picture"), "nano", monkeypatch, capsys)
    for line, family in zip(lines, ("text", "shapes", "grounding"), strict=True):
        mixture = Mixture(weights={family: 1}, split="held_out", fonts="bundled")
        (question,) = sample(2, 0, mixture).questions
        if family == "grounding":
            assert "Show me where the purple square is. purple square: (" in line
        else:
            assert line == f"{question.text} {question.answer}"
