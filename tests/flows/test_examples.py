"""The examples run as written: on nano if it is shipped, else on a tiny random model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

from tests.folders import write_tiny

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
HAS_NANO = (ROOT / "qwen2vl" / "nano" / "config.json").is_file()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the MODEL argument of the examples."""
    if HAS_NANO:
        return "nano"
    folder = tmp_path_factory.mktemp("examples") / "tiny"
    write_tiny(folder)
    return str(folder)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(
    path: Path,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path), model])
    runpy.run_path(str(path), run_name="__main__")
    assert "? " in capsys.readouterr().out, "it prints the question and the answer"


def test_there_are_examples() -> None:
    names = "01_ask 02_video 03_grounding 04_batch 05_async 06_readme_picture".split()
    assert [path.stem for path in EXAMPLES] == names


def test_grounding_draws_on_the_image(model: str, tmp_path: Path) -> None:
    output = tmp_path / "boxes.png"
    runpy.run_path(str(ROOT / "examples" / "03_grounding.py"))["main"](model, str(output))
    with Image.open(output) as image:
        assert image.size == (280, 196)
        assert image.getpixel((62, 82)) == (255, 0, 0), "the red disc is still there"
