"""TrainState: built from a config, stage by stage, saved to and resumed from checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2vl.errors import CheckpointError, ConfigError, EngineError
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.recipes import tiny
from qwen2vl.train.checkpoint import CheckpointSaver
from qwen2vl.train.config import TrainConfig, dump, override
from qwen2vl.train.state import TrainState, build_train_state, resume

SINGLE_PROCESS = DistributedContext(torch.device("cpu"))


def config(out: Path, *overrides: str) -> TrainConfig:
    steps = [f"stages.{i}.steps=2" for i in range(4)]
    return override(tiny.recipe(), [*steps, "optim.name=adamw", f"output_dir={out}", *overrides])


def save_state(state: TrainState) -> Path:
    """Save a checkpoint of `state`."""
    saver = CheckpointSaver(state.folder, 9, SINGLE_PROCESS)
    path = saver.save(state.step, state.state_dict(), {"config": json.loads(dump(state.config))})
    saver.close()
    return path


def state_at_step(out: Path, step: int, *overrides: str) -> TrainState:
    """Build a state at `step`, with optimizer states as after one step of its stage."""
    state = build_train_state(config(out, *overrides), SINGLE_PROCESS)
    state.step = step - 1
    state.start_stage()
    assert state.optimizers is not None
    for parameter in state.optimizers.parameters.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    state.optimizers.clip_grad_norm()
    state.optimizers.step(1.0)
    state.step = step
    return state


def test_a_stage_starts_where_the_previous_one_ends(tmp_path: Path) -> None:
    state = build_train_state(config(tmp_path), SINGLE_PROCESS)
    stage_starts = []
    for state.step in range(9):
        stage_starts.append(state.is_stage_start)
    assert stage_starts == [True, False] * 4 + [False]
    assert [state.stage_at(step).name for step in (0, 1, 2, 7)] == [
        "words",
        "words",
        "see",
        "answers",
    ]


def test_a_stage_applies_its_freezing_rules_and_resets_optimizer_states(tmp_path: Path) -> None:
    state = state_at_step(tmp_path, 1)
    assert state.optimizers is not None and state.optimizers.state_dict()
    assert not any(p.requires_grad for p in state.model.visual.blocks.parameters())
    state.step = 2
    state.start_stage()
    assert not state.optimizers.state_dict()
    assert state.guard is not None and state.guard.num_seen == 0
    assert {n for n, p in state.model.named_parameters() if p.requires_grad} == set(
        state.optimizers.parameters
    )


def test_rules_that_freeze_every_parameter_are_refused(tmp_path: Path) -> None:
    state = build_train_state(config(tmp_path, 'stages.0.rules=[[".*",0]]'), SINGLE_PROCESS)
    with pytest.raises(ConfigError, match="stage words: its rules freeze every parameter"):
        state.start_stage()


def test_resuming_restores_every_saved_tensor(tmp_path: Path) -> None:
    state = state_at_step(tmp_path, 1)
    assert state.guard is not None
    state.guard.should_skip(1, torch.tensor(2.0), torch.tensor(3.0))
    saved_tensors = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    save_state(state)
    torch.rand(7)  # advances the RNG, which resuming must restore
    resumed = build_train_state(config(tmp_path), SINGLE_PROCESS)
    for parameter in resumed.model.parameters():
        parameter.data.zero_()
    resume(resumed)
    assert resumed.step == 1
    assert resumed.guard is not None and resumed.guard.num_seen == 1
    loaded = resumed.state_dict()
    assert loaded.keys() == saved_tensors.keys()
    for name, tensor in saved_tensors.items():
        assert torch.equal(loaded[name], tensor), name


def test_optimizer_states_are_not_loaded_at_the_end_of_a_stage(tmp_path: Path) -> None:
    save_state(state_at_step(tmp_path, 2))
    resumed = build_train_state(config(tmp_path), SINGLE_PROCESS)
    resume(resumed)
    assert (resumed.step, resumed.is_stage_start, resumed.optimizers) == (2, True, None)


def test_without_a_checkpoint_the_run_starts_at_step_0(tmp_path: Path) -> None:
    state = build_train_state(config(tmp_path), SINGLE_PROCESS)
    resume(state)
    assert state.step == 0


def test_a_checkpoint_of_another_world_size_or_version_may_lack_states(tmp_path: Path) -> None:
    path = save_state(state_at_step(tmp_path, 1))
    (file,) = path.glob("*.safetensors")
    remaining = {
        n: t for n, t in load_file(file).items() if not n.startswith(("random|", "guard|"))
    }
    save_file(remaining, path / "model.safetensors")
    file.unlink()
    manifest = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**manifest, "files": {}}))
    resumed = build_train_state(config(tmp_path), SINGLE_PROCESS)
    resume(resumed)
    assert resumed.step == 1
    assert resumed.guard is not None and resumed.guard.num_seen == 0


def test_a_checkpoint_without_a_weight_is_refused(tmp_path: Path) -> None:
    state = state_at_step(tmp_path, 1)
    tensors = {n: t for n, t in state.state_dict().items() if n != "model.norm.weight"}
    saver = CheckpointSaver(state.folder, 2, SINGLE_PROCESS)
    saver.save(1, tensors, {"config": json.loads(dump(state.config))})
    saver.close()
    with pytest.raises(CheckpointError, match="does not fit this run; delete it to resume before"):
        resume(build_train_state(config(tmp_path), SINGLE_PROCESS))


def test_a_step_with_a_nonfinite_loss_is_not_saved(tmp_path: Path) -> None:
    state = state_at_step(tmp_path, 1)
    assert state.guard is not None
    state.guard.should_skip(1, torch.tensor(float("nan")), torch.tensor(1.0))
    with pytest.raises(EngineError, match="step 1: loss nan"):
        state.state_dict()
