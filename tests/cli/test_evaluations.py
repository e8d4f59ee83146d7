"""Probes as the command joins them: held-out conversations and the suite, on a live model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen2vl.cli import evaluations
from qwen2vl.cli.evaluations import probe_of
from qwen2vl.errors import ConfigError
from qwen2vl.eval.mini import build
from qwen2vl.recipes import tiny
from qwen2vl.train.config import ProbeConfig, TrainConfig
from tests.eval.fontless import hide_fonts
from tests.tiny import tiny_model, tiny_processor


def config(folder: Path, **words: int) -> TrainConfig:
    return replace(tiny.recipe(), out=str(folder), probe=ProbeConfig(**words))


@pytest.fixture
def _shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "_plain_tasks", lambda: [build("shapes"), build("motion")])


@pytest.mark.usefixtures("_shapes_alone")
def test_a_live_model_is_asked_and_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model().train().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = probe_of(config(tmp_path, examples=4, questions=2))(model, tiny_processor(), 1)
    assert found["held_out"]["loss"] > 0
    assert set(found["mini"]) == {"shapes", "motion"}
    assert all(0 <= part["share_right"] <= 1 for part in found["mini"].values())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_only_what_is_asked_for_is_measured(tmp_path: Path) -> None:
    model = tiny_model()
    nothing = probe_of(config(tmp_path, examples=0))(model, tiny_processor(), 1)
    assert nothing == {}


def test_parts_whose_fonts_are_missing_are_left_out_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide_fonts(monkeypatch)
    names = {task.name for task in evaluations._plain_tasks()}
    assert {"shapes", "motion", "counting"} <= names
    assert "text" not in names and not any(name.startswith("wrong") for name in names)
    assert "text is left out" in capsys.readouterr().err


def test_the_suite_needs_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"set probe.questions=0"):
        probe_of(config(tmp_path, questions=5))
