"""The training loop: no device synchronization inside a step; a warning inside the warm-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl.flops import build_flop_counter
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.recipes import tiny
from qwen2vl.train import loop
from qwen2vl.train.config import OptimConfig, override
from qwen2vl.train.logging.metrics import Metrics
from qwen2vl.train.loop import train_step
from qwen2vl.train.optim.spike_guard import WINDOW
from tests.parallel.training_jobs import (
    EMPTY,
    MIXED,
    TEXT,
    Case,
    build_case_state,
    pack_conversations,
)


class NoSyncMode(TorchDispatchMode):
    """Fails where the host waits for the device, as `.item()` and `float()` do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert "_local_scalar_dense" not in name, "the host waited for a number"
        assert "nonzero" not in name and "masked_select" not in name, f"{name} waits for a size"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["muon", "adamw", "sgd"])
def test_a_step_does_not_synchronize_with_the_device(tmp_path: Path, method: Any) -> None:
    case = Case(shares=(((TEXT,),),), optim=OptimConfig(name=method), dtype="float32")
    state = build_case_state(case, DistributedContext(torch.device("cpu")), str(tmp_path))
    state.start_stage()
    assert state.guard is not None
    state.guard.num_seen = WINDOW  # the spike check is active from the first step on
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.flop_counter = build_flop_counter(state.model)
    batches = [pack_conversations(MIXED), pack_conversations(EMPTY)]
    with NoSyncMode():
        for _ in range(2):
            train_step(state, batches, metrics, 0.0)
    assert metrics.report(step=2)["loss"] > 0


def test_no_sync_mode_detects_a_synchronization() -> None:
    with NoSyncMode(), pytest.raises(AssertionError, match="the host waited"):
        torch.ones(()).item()


@pytest.mark.parametrize(("warmup", "is_logged"), [(3, True), (2, False)])
@pytest.mark.parametrize("earlier_steps", [0, 1], ids=["first", "later"])
def test_a_run_that_stops_inside_the_warmup_logs_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    earlier_steps: int,
    warmup: int,
    is_logged: bool,
) -> None:
    overrides = [f"stages.{i}.steps={n}" for i, n in enumerate((earlier_steps, 2, 0, 0))]
    overrides += [f"stages.{i}.global_batch_size=2" for i in (0, 1)]
    overrides += [f"optim.warmup_steps={warmup}", "num_workers=0"]
    loop.train(override(tiny.recipe(), [*overrides, "num_threads=1", f"output_dir={tmp_path}"]))
    text = f"step {earlier_steps + 2} is one of the 3 warm-up steps of stage see, in which the"
    assert (text in caplog.text) == is_logged
