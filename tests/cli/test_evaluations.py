"""Evaluation during training: held-out loss and the mini suite, on a model in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen2vl.cli import evaluations
from qwen2vl.cli.evaluations import build_evaluation
from qwen2vl.errors import ConfigError
from qwen2vl.eval.suites.synthetic_suite import SyntheticSuite
from qwen2vl.recipes import tiny
from qwen2vl.train.config import EvaluationConfig, TrainConfig
from tests.fonts import hide_system_fonts
from tests.tiny import tiny_model, tiny_processor


def config(folder: Path, **fields: int) -> TrainConfig:
    return replace(tiny.recipe(), output_dir=str(folder), evaluation=EvaluationConfig(**fields))


@pytest.fixture
def _shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "_base_parts", lambda suite: ["shapes", "motion"])


@pytest.mark.usefixtures("_shapes_alone")
def test_evaluation_leaves_the_model_unchanged(tmp_path: Path) -> None:
    model = tiny_model().train().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metrics = build_evaluation(config(tmp_path, num_examples=4, num_questions=2))(
        model, tiny_processor(), 1
    )
    assert metrics["held_out"]["loss"] > 0
    assert set(metrics["mini"]) == {"shapes", "motion"}
    assert all(0 <= part["accuracy"] <= 1 for part in metrics["mini"].values())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_disabled_evaluations_return_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    metrics = build_evaluation(config(tmp_path, num_examples=0))(model, tiny_processor(), 1)
    assert metrics == {}


def test_parts_whose_fonts_are_missing_are_skipped_with_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide_system_fonts(monkeypatch)
    names = set(evaluations._base_parts(SyntheticSuite()))
    assert {"shapes", "motion", "counting"} <= names
    assert "text" not in names and not any(name.startswith("wrong") for name in names)
    assert "text is left out" in capsys.readouterr().err


def test_the_mini_suite_requires_one_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"set evaluation.num_questions=0"):
        build_evaluation(config(tmp_path, num_questions=5))
