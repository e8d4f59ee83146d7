"""A run while it runs: what is built, which stage is begun, what a checkpoint takes and gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2vl.errors import CheckpointError, ConfigError, EngineError
from qwen2vl.parallel.mesh import Ranks
from qwen2vl.recipes import tiny
from qwen2vl.train.checkpoint import Saver
from qwen2vl.train.config import TrainConfig, dump, override
from qwen2vl.train.state import Run, build, resume

ONE = Ranks(torch.device("cpu"))


def config(out: Path, *words: str) -> TrainConfig:
    steps = [f"stages.{i}.steps=2" for i in range(4)]
    return override(tiny.recipe(), [*steps, "optim.method=adamw", f"out={out}", *words])


def saved(run: Run) -> Path:
    """Save a run as it stands."""
    saver = Saver(run.folder, 9, ONE)
    path = saver.save(run.step, run.tensors(), {"config": json.loads(dump(run.config))})
    saver.close()
    return path


def at(out: Path, step: int, *words: str) -> Run:
    """Build a run, and let it have moments as after one step of the stage that `step` is in."""
    run = build(config(out, *words), ONE)
    run.step = step - 1
    run.begin_stage()
    assert run.optimizers is not None
    for parameter in run.optimizers.named.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    run.optimizers.clip()
    run.optimizers.step(1.0)
    run.step = step
    return run


def test_stages_begin_where_the_ones_before_end(tmp_path: Path) -> None:
    run = build(config(tmp_path), ONE)
    begins = []
    for run.step in range(9):
        begins.append(run.begins_stage)
    assert begins == [True, False] * 4 + [False]
    assert [run.stage(step).name for step in (0, 1, 2, 7)] == ["words", "words", "see", "answers"]


def test_a_stage_freezes_what_its_rules_freeze_and_begins_without_moments(tmp_path: Path) -> None:
    run = at(tmp_path, 1)
    assert run.optimizers is not None and run.optimizers.state()
    assert not any(p.requires_grad for p in run.model.visual.blocks.parameters())
    run.step = 2
    run.begin_stage()
    assert not run.optimizers.state()
    assert run.guard is not None and run.guard.seen == 0
    assert {n for n, p in run.model.named_parameters() if p.requires_grad} == set(
        run.optimizers.named
    )


def test_rules_that_leave_nothing_to_move_are_refused(tmp_path: Path) -> None:
    run = build(config(tmp_path, 'stages.0.rules=[[".*",0]]'), ONE)
    with pytest.raises(ConfigError, match="stage words: its rules freeze every parameter"):
        run.begin_stage()


def test_what_was_saved_is_what_goes_on(tmp_path: Path) -> None:
    run = at(tmp_path, 1)
    assert run.guard is not None
    run.guard.judge(1, torch.tensor(2.0), torch.tensor(3.0))
    kept = {name: tensor.clone() for name, tensor in run.tensors().items()}
    saved(run)
    torch.rand(7)  # other numbers come next, unless the state is put back
    again = build(config(tmp_path), ONE)
    for parameter in again.model.parameters():
        parameter.data.zero_()
    resume(again)
    assert again.step == 1
    assert again.guard is not None and again.guard.seen == 1
    found = again.tensors()
    assert found.keys() == kept.keys()
    for name, tensor in kept.items():
        assert torch.equal(found[name], tensor), name


def test_at_the_end_of_a_stage_moments_are_left_behind(tmp_path: Path) -> None:
    saved(at(tmp_path, 2))
    again = build(config(tmp_path), ONE)
    resume(again)
    assert (again.step, again.begins_stage, again.optimizers) == (2, True, None)


def test_without_a_checkpoint_a_run_begins(tmp_path: Path) -> None:
    run = build(config(tmp_path), ONE)
    resume(run)
    assert run.step == 0


def test_a_checkpoint_of_other_ranks_or_an_older_version_may_lack_states(tmp_path: Path) -> None:
    path = saved(at(tmp_path, 1))
    (file,) = path.glob("*.safetensors")
    old = {n: t for n, t in load_file(file).items() if not n.startswith(("random|", "guard|"))}
    save_file(old, path / "model.safetensors")
    file.unlink()
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "files": {}}))
    again = build(config(tmp_path), ONE)
    resume(again)
    assert again.step == 1
    assert again.guard is not None and again.guard.seen == 0


def test_a_checkpoint_without_a_weight_is_refused(tmp_path: Path) -> None:
    run = at(tmp_path, 1)
    tensors = {n: t for n, t in run.tensors().items() if n != "model.norm.weight"}
    saver = Saver(run.folder, 2, ONE)
    saver.save(1, tensors, {"config": json.loads(dump(run.config))})
    saver.close()
    with pytest.raises(CheckpointError, match="does not fit this run; delete it to resume before"):
        resume(build(config(tmp_path), ONE))


def test_a_step_that_broke_is_not_kept(tmp_path: Path) -> None:
    run = at(tmp_path, 1)
    assert run.guard is not None
    run.guard.judge(1, torch.tensor(float("nan")), torch.tensor(1.0))
    with pytest.raises(EngineError, match="step 1: loss nan"):
        run.tensors()
