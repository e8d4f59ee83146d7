"""Inside a step the host reads nothing from the device; a leg that was too short says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl.parallel.mesh import Ranks
from qwen2vl.recipes import tiny
from qwen2vl.train import loop
from qwen2vl.train.config import OptimConfig, override
from qwen2vl.train.flops import costs
from qwen2vl.train.logging.metrics import Metrics
from qwen2vl.train.loop import one_step
from qwen2vl.train.optim.spike_guard import WINDOW
from tests.parallel.jobs import MIXED, NOTHING, TEXT, Case, make, packed


class Reading(TorchDispatchMode):
    """Fails where a number is brought to the host, as `.item()` and `float()` do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert "_local_scalar_dense" not in name, "the host waited for a number"
        assert "nonzero" not in name and "masked_select" not in name, f"{name} waits for a size"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["muon", "adamw", "sgd"])
def test_a_step_reads_no_number(tmp_path: Path, method: Any) -> None:
    case = Case(shares=(((TEXT,),),), optim=OptimConfig(method=method), dtype="float32")
    run = make(case, Ranks(torch.device("cpu")), str(tmp_path))
    run.begin_stage()
    assert run.guard is not None
    run.guard.seen = WINDOW  # spikes are judged from the first step on
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.costs = costs(run.model)
    own = [packed(MIXED), packed(NOTHING)]
    with Reading():
        for _ in range(2):
            one_step(run, own, metrics, 0.0)
    assert metrics.report(step=2)["loss"] > 0


def test_the_reader_of_numbers_is_caught() -> None:
    with Reading(), pytest.raises(AssertionError, match="the host waited"):
        torch.ones(()).item()


@pytest.mark.parametrize(("warmup", "is_told"), [(3, True), (2, False)])
@pytest.mark.parametrize("before", [0, 1], ids=["first", "later"])
def test_a_leg_that_ends_while_the_rate_still_rises_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: int, warmup: int, is_told: bool
) -> None:
    words = [f"stages.{i}.steps={n}" for i, n in enumerate((before, 2, 0, 0))]
    words += [f"stages.{i}.examples=2" for i in (0, 1)]
    words += [f"optim.warmup={warmup}", "workers=0"]
    loop.train(override(tiny.recipe(), [*words, "threads=1", f"out={tmp_path}"]))
    text = f"step {before + 2} is one of the 3 in which the rate of stage see still rises"
    assert (text in caplog.text) == is_told
