"""`plot`: the file written, the default name, and errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Run
from tests.cli.test_training_curves import evaluation, training, write_run


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_run(tmp_path / "good", *map(training, range(10, 60, 10)), evaluation(50, 0.1))


@pytest.mark.usefixtures("good")
def test_a_run_is_plotted_to_an_image(run: Run, tmp_path: Path) -> None:
    result = run("plot", "good", "-o", "curves.png")
    assert result.exit_code == 0, result.stderr
    assert (result.stdout, result.stderr) == ("", "qwen2vl: wrote curves.png\n")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 50


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    ("name", "begin"), [("a.PNG", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_the_suffix_chooses_the_format(run: Run, tmp_path: Path, name: str, begin: bytes) -> None:
    result = run("plot", "good", "good/metrics.jsonl", "-o", name)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / name).read_bytes().startswith(begin)


@pytest.mark.usefixtures("good")
def test_the_default_file_is_run_png(run: Run, tmp_path: Path) -> None:
    assert run("plot", "good").stderr == "qwen2vl: wrote run.png\n"
    assert (tmp_path / "run.png").is_file()


@pytest.mark.usefixtures("good")
def test_the_extra_is_named_where_matplotlib_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("plot", "good")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "matplotlib, which is missing; pip install 'qwen2vl[plot]'" in line


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: cannot be read: No such file or directory; give the output_dir of"),
        (["good/model-000050"], "cannot be read: No such file or directory; give good"),
        (["empty"], "holds no report yet; a run writes one every logging_steps steps"),
        (["broken"], "broken/metrics.jsonl: line 2 is no line of metrics"),
        (["good", "-o", "x.jpg"], "-o x.jpg: give a name that ends in .png, .svg, .pdf"),
        (["good", "-o", "no/where.png"], "-o no/where.png: the folder"),
        (["good", "-o", "folder.png"], "-o folder.png: cannot be written: Is a directory"),
        ([], "Missing argument 'RUN...'"),
    ],
)
def test_errors_are_one_line(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    write_run(tmp_path / "empty")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "good" / "model-000050").mkdir()
    broken = write_run(tmp_path / "broken", training(1)) / "metrics.jsonl"
    broken.write_text(broken.read_text() + "[1]\n")
    result = run("plot", *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line
