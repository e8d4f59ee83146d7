"""Checkpoints saved on two ranks and resumed on one, two and four: the same next step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen2vl.errors import CheckpointError
from qwen2vl.parallel.mesh import DistributedContext, init_distributed
from qwen2vl.train import checkpoint
from qwen2vl.train.config import OptimConfig
from tests.parallel import training_jobs
from tests.parallel.process_pool import ProcessPool
from tests.parallel.training_jobs import EMPTY, IMAGES, MIXED, TEXT, VIDEO, Case, Result

ADAMW = OptimConfig(name="adamw", lr=1e-2, eps=1e-3, warmup_steps=1)
MUON = OptimConfig(name="muon", lr=1e-2, eps=1e-3, warmup_steps=1)

SHARES = (
    ((TEXT,), (IMAGES,)),
    ((VIDEO,), (EMPTY,)),
    ((MIXED,), (TEXT,)),
)
SHARES_OF_FOUR = tuple((*step, (EMPTY,), (EMPTY,)) for step in SHARES)


def largest_difference(first: Result, second: Result) -> float:
    pairs = [
        (tensors[name], other_tensors[name])
        for tensors, other_tensors in (
            (first.parameters, second.parameters),
            (first.optimizer_states, second.optimizer_states),
        )
        for name in tensors
    ]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("optim", [ADAMW, MUON], ids=["adamw", "muon"])
def test_any_world_size_resumes_a_checkpoint_of_two_ranks(
    process_pool: ProcessPool, tmp_path: Path, optim: OptimConfig
) -> None:
    case, folder = Case(shares=SHARES, optim=optim), str(tmp_path)
    uninterrupted = process_pool.run(2, training_jobs.save_and_step, case, folder)[0]
    assert sorted(p.name[:11] for p in (tmp_path / "step-000002").glob("*.safetensors")) == [
        "shard-00001",
        "shard-00002",
    ]
    resumed = process_pool.run(2, training_jobs.resume_and_step, case, folder)[0]
    on_four = process_pool.run(
        4,
        training_jobs.resume_and_step,
        replace(case, shares=SHARES_OF_FOUR, dp_replicate=2),
        folder,
    )[0]
    single_process = training_jobs.resume_state(
        training_jobs.single_process_case(case), DistributedContext(torch.device("cpu")), folder
    )
    assert uninterrupted.optimizer_states.keys() == single_process.optimizer_states.keys()
    assert largest_difference(uninterrupted, resumed) == 0.0
    # Newton-Schulz runs in bfloat16, where the order of a sum changes the result.
    limit = 1e-10 if optim is ADAMW else 1e-2
    assert largest_difference(uninterrupted, on_four) < limit
    assert largest_difference(uninterrupted, single_process) < limit


def fail_to_save(folder: str, name: str, failing: int) -> str:
    """Save while a function fails on one rank; return the error text."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with init_distributed("cpu") as distributed, pytest.MonkeyPatch.context() as patch:
        if distributed.rank == failing:
            patch.setattr(name, fail)
        saver = checkpoint.CheckpointSaver(Path(folder), 2, distributed)
        saver.save(1, {f"own|{distributed.rank}": torch.ones(2)}, {})
        with pytest.raises(CheckpointError) as caught:
            saver.close()
        return str(caught.value)


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("qwen2vl.train.checkpoint.atomic_folder", 0),
        ("qwen2vl.train.checkpoint._size_and_digest", 1),
        ("os.replace", 0),
    ],
)
def test_all_ranks_raise_when_one_cannot_save(
    process_pool: ProcessPool, tmp_path: Path, name: str, failing: int
) -> None:
    first, second = process_pool.run(2, fail_to_save, str(tmp_path), name, failing)
    assert first == second
    assert "step-000001: cannot be saved: No space left on device; free" in first
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_two_ranks_has_the_full_tensors(
    process_pool: ProcessPool, tmp_path: Path
) -> None:
    case = Case(shares=SHARES, optim=ADAMW)
    process_pool.run(2, training_jobs.save_and_step, case, str(tmp_path))
    path = tmp_path / "step-000002"
    single_process = DistributedContext(torch.device("cpu"))
    checkpoint.verify(path, single_process)
    shapes = checkpoint.tensor_shapes(path)
    model = training_jobs.build_case_state(case, single_process).model
    for name, parameter in model.named_parameters():
        assert shapes[name] == parameter.shape
        assert shapes[f"{name}|exp_avg"] == parameter.shape
    # One RNG state per rank; step counters once.
    assert {"random|0|cpu", "random|1|cpu"} <= shapes.keys()
    assert shapes["model.norm.weight|step"] == torch.Size([])
