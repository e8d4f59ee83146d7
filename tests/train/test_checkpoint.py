"""Checkpoints: whole or not there, the last few stay, foreign and damaged ones are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.recipes import tiny
from qwen2vl.recipes.nano import ALL
from qwen2vl.train import checkpoint
from qwen2vl.train.config import OptimConfig, override
from qwen2vl.train.optim import Optimisers, apply_rules
from tests.tiny import tiny_model


def saved(folder: Path, *steps: int) -> tuple[torch.nn.Module, Optimisers]:
    model = tiny_model(seed=0)
    optimisers = Optimisers(model, apply_rules(model, ALL), OptimConfig())
    for step in steps:
        checkpoint.save(folder, step, model, optimisers, tiny.recipe())
    return model, optimisers


def test_the_last_ones_stay_and_the_newest_is_found(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None
    saved(tmp_path, 10, 20, 30)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000020", "step-000030"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000030"


def test_an_unfinished_save_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 10)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 20)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000010"
    saved(tmp_path, 20)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000020"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    saved(tmp_path, 10)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(CheckpointError, match="step-000020: cannot be saved: No space left on"):
        saved(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run: cannot be made a folder: Not a directory"):
        checkpoint.make_folder(tmp_path / "file" / "run")


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    path = tmp_path / "step-000010"
    assert checkpoint.read_step(path, tiny.recipe()) == 10
    assert checkpoint.read_step(path, override(tiny.recipe(), ["workers=0", "out=x"])) == 10
    with pytest.raises(CheckpointError, match="other values of stages, seed"):
        checkpoint.read_step(path, override(tiny.recipe(), ["seed=3", "stages.0.examples=4"]))


@pytest.mark.parametrize(
    "word", ["model.text.rms_norm_eps=1e-5", "min_pixels=784", "max_pixels=784000", "init=x"]
)
def test_what_decides_the_bits_must_stay(tmp_path: Path, word: str) -> None:
    saved(tmp_path, 10)
    name = word.partition("=")[0].partition(".")[0]
    with pytest.raises(CheckpointError, match=f"other values of {name};"):
        checkpoint.read_step(tmp_path / "step-000010", override(tiny.recipe(), [word]))


@pytest.mark.parametrize(
    "damage", ["", "{}", json.dumps({"step": "x", "config": {}}), '{"step":1,"config":3}']
)
def test_a_damaged_state_is_refused(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 10)
    (tmp_path / "step-000010" / "state.json").write_text(damage)
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        checkpoint.read_step(tmp_path / "step-000010", tiny.recipe())


def test_cut_weights_are_refused(tmp_path: Path) -> None:
    model, optimisers = saved(tmp_path, 10)
    path = tmp_path / "step-000010" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="does not fit this run"):
        checkpoint.restore(tmp_path / "step-000010", model, optimisers)
