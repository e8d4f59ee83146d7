"""`qwen2vl parity`: table, verdict, JSON, exit codes, and missing transformers."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from qwen2vl.cli.main import main
from qwen2vl.convert import quantize_folder
from tests.folders import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "tiny"
    write_tiny(path)
    return path


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["parity", *map(str, args)])


def test_a_valid_folder_is_equal_with_exit_code_zero(folder: Path) -> None:
    result = run("--model", folder)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"model: {folder}"
    assert lines[-1].startswith("equal in 16 steps; largest relative error ")
    for step in ("pixels", "positions", "vision.block.1", "text.layer.1", "logits"):
        assert any(step in line and "equal" in line for line in lines)


def test_a_divergence_is_named_with_exit_code_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_sigmoid(_self: Any, x_NE: Any) -> Any:
        return _self.fc2(_self.fc1(x_NE))

    monkeypatch.setattr("qwen2vl.model.vision.VisionMLP.forward", without_sigmoid)
    result = run("--model", folder)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("first divergence: ")
    assert result.stdout.splitlines()[-1].endswith(" at vision.block.0, limit 1e-05")
    assert "DIFFERS" in result.stdout


def test_json_output_has_every_step(folder: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    result = run("--model", folder, "--image", tmp_path / "noise.png", "--json", "What is this?")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["model"] == str(folder)
    assert report["equal"] is True and report["first_divergence"] is None
    assert [step["step"] for step in report["steps"]][:4] == ["pixels", "grids", "ids", "positions"]
    assert all(step["equal"] and step["relative"] <= step["limit"] for step in report["steps"])


def test_json_output_has_null_for_infinity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2vl.processor.chat_template._with_system", lambda turns, _tools: turns)
    result = run("--model", folder, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout, parse_constant=pytest.fail)
    assert report["first_divergence"] == "ids"
    ids = next(step for step in report["steps"] if step["step"] == "ids")
    assert ids["relative"] is None and ids["note"].startswith("shapes (")


@pytest.mark.parametrize("question", ["sub", "Qwen/Qwen2-VL-2B-Instruct", "~"])
def test_a_path_in_place_of_the_question_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    """Else nano would be compared in place of the folder, and be equal."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    result = run(question)
    assert result.exit_code == 2
    assert f"is a path, not a question; --model {shlex.quote(question)} compares" in result.stderr
    assert result.stdout == ""


def test_the_tolerance_is_configurable(folder: Path) -> None:
    result = run("--model", folder, "--tolerance", "1e-9")
    assert result.exit_code == 1
    assert "vision.patch_embed" in result.stdout.splitlines()[-1]


def test_quantized_folder_is_compared_dequantized(folder: Path, tmp_path: Path) -> None:
    quantize_folder(folder, tmp_path / "int4", "int4")
    result = run("--model", tmp_path / "int4")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"quantized \(compressed-tensors: .*\): both compute with the dequantized weights",
        result.stderr.replace("\n", " "),
    )


def test_missing_transformers_is_a_one_line_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("--model", folder)
    assert result.exit_code == 2
    assert result.stderr == (
        "qwen2vl: error: parity compares with transformers, but transformers cannot be imported; "
        "pip install 'qwen2vl[parity]'\n"
    )
