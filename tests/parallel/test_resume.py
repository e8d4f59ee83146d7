"""Saved on two ranks, resumed on one, two and four: the same weights and moments, the same step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen2vl.errors import CheckpointError
from qwen2vl.parallel.mesh import Ranks, join
from qwen2vl.train import checkpoint
from qwen2vl.train.config import OptimConfig
from tests.parallel import jobs
from tests.parallel.gang import Gang
from tests.parallel.jobs import MIXED, NOTHING, PICTURES, TEXT, VIDEO, Case, Result

ADAMW = OptimConfig(method="adamw", lr=1e-2, eps=1e-3, warmup=1)
MUON = OptimConfig(method="muon", lr=1e-2, eps=1e-3, warmup=1)

SHARES = (
    ((TEXT,), (PICTURES,)),
    ((VIDEO,), (NOTHING,)),
    ((MIXED,), (TEXT,)),
)
ON_FOUR = tuple((*step, (NOTHING,), (NOTHING,)) for step in SHARES)


def largest_difference(one: Result, two: Result) -> float:
    pairs = [
        (mine[name], theirs[name])
        for mine, theirs in ((one.parameters, two.parameters), (one.moments, two.moments))
        for name in mine
    ]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("optim", [ADAMW, MUON], ids=["adamw", "muon"])
def test_any_number_of_ranks_goes_on_where_two_stopped(
    gang: Gang, tmp_path: Path, optim: OptimConfig
) -> None:
    case, folder = Case(shares=SHARES, optim=optim), str(tmp_path)
    kept = gang.run(2, jobs.save, case, folder)[0]
    assert sorted(p.name[:11] for p in (tmp_path / "step-000002").glob("*.safetensors")) == [
        "shard-00001",
        "shard-00002",
    ]
    again = gang.run(2, jobs.go_on, case, folder)[0]
    four = gang.run(4, jobs.go_on, replace(case, shares=ON_FOUR, replicate=2), folder)[0]
    one = jobs.resumed(jobs.union(case), Ranks(torch.device("cpu")), folder)
    assert kept.moments.keys() == one.moments.keys()
    assert largest_difference(kept, again) == 0.0
    # Newton-Schulz computes in bfloat16, where the order of a sum is seen.
    limit = 1e-10 if optim is ADAMW else 1e-2
    assert largest_difference(kept, four) < limit
    assert largest_difference(kept, one) < limit


def fail_to_save(folder: str, name: str, failing: int) -> str:
    """Save while a function fails on one rank; say how it is told."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with join("cpu") as ranks, pytest.MonkeyPatch.context() as patch:
        if ranks.rank == failing:
            patch.setattr(checkpoint, name, fail)
        saver = checkpoint.Saver(Path(folder), 2, ranks)
        saver.save(1, {f"own|{ranks.rank}": torch.ones(2)}, {})
        with pytest.raises(CheckpointError) as told:
            saver.close()
        return str(told.value)


@pytest.mark.parametrize(("name", "failing"), [("_make_empty", 0), ("_measure", 1), ("_finish", 0)])
def test_what_one_rank_cannot_save_all_tell(
    gang: Gang, tmp_path: Path, name: str, failing: int
) -> None:
    first, second = gang.run(2, fail_to_save, str(tmp_path), name, failing)
    assert first == second
    assert "step-000001: cannot be saved: No space left on device; free" in first
    assert list(tmp_path.iterdir()) == []


def test_what_two_ranks_wrote_is_whole_in_the_files(gang: Gang, tmp_path: Path) -> None:
    case = Case(shares=SHARES, optim=ADAMW)
    gang.run(2, jobs.save, case, str(tmp_path))
    path = tmp_path / "step-000002"
    one = Ranks(torch.device("cpu"))
    checkpoint.verify(path, one)
    shapes = checkpoint.shapes(path)
    model = jobs.make(case, one).model
    for name, parameter in model.named_parameters():
        assert shapes[name] == parameter.shape
        assert shapes[f"{name}|exp_avg"] == parameter.shape
    # A state of its own for every rank; counters once.
    assert {"random|0|cpu", "random|1|cpu"} <= shapes.keys()
    assert shapes["model.norm.weight|step"] == torch.Size([])
