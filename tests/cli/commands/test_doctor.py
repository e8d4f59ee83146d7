"""`doctor`: what a bug report needs, and damaged folders by the names of their tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.eval.fontless import hide_fonts


def test_it_reports_the_machine(run: Run) -> None:
    result = run("doctor")
    assert result.exit_code == 0
    names = [line[:13].split()[0] for line in result.stdout.splitlines()]
    assert {"qwen2vl", "python", "torch", "device", "dtype", "memory", "video", "nano"} <= {*names}
    assert f"torch        {torch.__version__.split('+')[0]}" in result.stdout
    assert "h264" in result.stdout


def test_missing_fonts_come_with_the_packages(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_fonts(monkeypatch)
    lines = run("doctor").stdout.splitlines()
    for use, package in (("training", "fonts-dejavu-core"), ("judging", "fonts-cabin")):
        (line,) = (line for line in lines if f"for {use}:" in line)
        assert f"apt-get install {package}" in line


def test_a_sound_folder(run: Run, tiny_folder: Path) -> None:
    result = run("doctor", "--check-weights", tiny_folder)
    assert result.exit_code == 0
    assert "tensors, config, tokenizer and pixel limits fit together" in result.stdout
    assert "every number is finite" in result.stdout


def test_tensors_that_are_not_finite_are_named(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    tensors["visual.merger.ln_q.bias"][0] = float("inf")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    result = run("doctor", "--check-weights", broken)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "2 tensors hold NaN or infinity" in line
    assert "model.norm.weight" in line
    assert "visual.merger.ln_q.bias" in line
    assert run("doctor", "--model", broken).exit_code == 0


def test_a_truncated_folder(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    result = run("doctor", "--model", broken)
    assert result.exit_code == 1
    assert "model.safetensors" in result.stderr
    assert len(result.stderr.splitlines()) == 1
