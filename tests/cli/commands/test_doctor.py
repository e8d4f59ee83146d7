"""`doctor`: environment report, and validation of model folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.fonts import hide_system_fonts


def test_the_environment_is_reported(run: Run) -> None:
    result = run("doctor")
    assert result.exit_code == 0
    names = [line[:13].split()[0] for line in result.stdout.splitlines()]
    assert {"qwen2vl", "python", "torch", "device", "dtype", "memory", "video", "nano"} <= {*names}
    assert f"torch        {torch.__version__.split('+')[0]}" in result.stdout
    assert "h264" in result.stdout


def test_missing_fonts_are_reported_with_their_packages(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_system_fonts(monkeypatch)
    lines = run("doctor").stdout.splitlines()
    for use, package in (("training", "fonts-dejavu-core"), ("evaluation", "fonts-cantarell")):
        (line,) = (line for line in lines if f"for {use}:" in line)
        assert f"apt-get install {package}" in line


def test_a_valid_folder(run: Run, tiny_folder: Path) -> None:
    result = run("doctor", "--check-weights", tiny_folder)
    assert result.exit_code == 0
    assert "tensors, config, tokenizer and pixel limits are consistent" in result.stdout
    assert "all tensors are finite" in result.stdout


def test_folders_are_positional_arguments_too(run: Run, tiny_folder: Path) -> None:
    result = run("doctor", tiny_folder, "--model", tiny_folder)
    assert result.stdout.count(f"{tiny_folder}: ") == 1
    result = run("doctor", tiny_folder, "nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


def test_nonfinite_tensors_are_listed(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    tensors["visual.merger.ln_q.bias"][0] = float("inf")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    result = run("doctor", "--check-weights", broken)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "2 tensors hold NaN or infinity" in line
    assert "model.norm.weight" in line
    assert "visual.merger.ln_q.bias" in line
    assert run("doctor", "--model", broken).exit_code == 0


def test_a_truncated_weights_file(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    result = run("doctor", "--model", broken)
    assert result.exit_code == 2
    assert "model.safetensors" in result.stderr
    assert len(result.stderr.splitlines()) == 1
