"""The benchmark that runs Tesseract on the mini suite."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.requirements import needs_judge_fonts, needs_tesseract

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "tesseract.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_tesseract", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_missing_program_is_a_one_line_error(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PROGRAM", "no-such-program")
    with pytest.raises(SystemExit, match=r"no-such-program cannot be run .*install tesseract-ocr"):
        script.find_version()


def test_images_are_doubled_in_size(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(script.as_png(np.zeros((20, 30, 3), dtype=np.uint8)))
    assert Image.open(tmp_path / "big.png").size == (60, 40)


@needs_judge_fonts
@needs_tesseract
def test_prints_one_json_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tesseract.py", "--limit", "3"])
    script.main()
    line = json.loads(capsys.readouterr().out)
    assert line["program"].startswith("tesseract ") and line["count"] == 3
    assert 0 <= line["character_errors"] < 0.5
