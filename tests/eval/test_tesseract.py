"""The benchmark that reads the suite with Tesseract."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.fonts import needs_judge_fonts

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "tesseract.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_tesseract", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_program_is_one_clear_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PROGRAM", "no-such-program")
    with pytest.raises(SystemExit, match=r"no-such-program cannot be run .*install tesseract-ocr"):
        script.find_version()


def test_pictures_are_doubled(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(script.as_png(np.zeros((20, 30, 3), dtype=np.uint8)))
    assert Image.open(tmp_path / "big.png").size == (60, 40)


@needs_judge_fonts
def test_it_reads_and_prints_one_json_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("tesseract") is None:
        reason = "tesseract is not installed; apt-get install tesseract-ocr"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    monkeypatch.setattr(sys, "argv", ["tesseract.py", "--limit", "3"])
    script.main()
    line = json.loads(capsys.readouterr().out)
    assert line["program"].startswith("tesseract ") and line["count"] == 3
    assert 0 <= line["character_errors"] < 0.5
