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
from tests.data.rows import conversation, create_data_config, create_run_config, write_rows
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


@pytest.mark.parametrize(
    ("warmup", "num_done", "warnings"),
    [
        (2, 3, []),
        (3, 3, ["stage see: its 2 steps are all warm-up"]),
        (3, 2, ["stage see: its 2 steps are all warm-up"]),  # once, also if it is cut short
        (2, 2, ["step 2 is one of the 2 warm-up steps of stage see"]),
    ],
)
def test_a_warmup_that_does_not_end_is_warned_of_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    warmup: int,
    num_done: int,
    warnings: list[str],
) -> None:
    polls = iter([""] * num_done + ["time"])
    monkeypatch.setattr(loop.SignalHandler, "poll", lambda *_: next(polls))
    overrides = [f"stages.{i}.steps={n}" for i, n in enumerate((1, 2, 0, 0))]
    overrides += [f"stages.{i}.global_batch_size=2" for i in (0, 1)]
    overrides += [f"optim.warmup_steps={warmup}", "num_workers=0"]
    loop.train(override(tiny.recipe(), [*overrides, "num_threads=1", f"output_dir={tmp_path}"]))
    logged = [text for text in caplog.messages if "stage see" in text]
    assert [text[: len(start)] for text, start in zip(logged, warnings, strict=True)] == warnings


def test_a_run_takes_the_threads_that_are_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = torch.get_num_threads()
    counts: list[int] = []
    monkeypatch.setattr(loop.threads, "default_num_threads", lambda: 3)
    try:
        for given in ("num_threads=0", "num_threads=2"):
            monkeypatch.setattr(loop, "create_run_folder", _stop)
            with pytest.raises(InterruptedError):
                loop.train(override(tiny.recipe(), [given, f"output_dir={tmp_path}"]))
            counts.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(setting)
    assert counts == [3, 2]


def _stop(folder: Path) -> None:
    raise InterruptedError


def test_the_first_report_does_not_wait_for_logging_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[dict[str, Any]] = []
    monkeypatch.setattr(loop, "MAX_FIRST_REPORT_SECONDS", 0.0)
    config = override(tiny.recipe(), [*one_stage(tmp_path, steps=4), "logging_steps=100"])
    loop.train(config, report=records.append)
    assert [record["step"] for record in records] == [1, 4]


def test_reports_have_the_learning_rate_of_their_last_step(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    settings = [*one_stage(tmp_path, steps=6), "logging_steps=1", "optim.lr=0.01"]
    loop.train(override(tiny.recipe(), settings), report=records.append)
    # A warm-up of four steps, and a linear decay in the second half to a tenth.
    expected = [0.0025, 0.005, 0.0075, 0.01, 0.007, 0.004]
    assert [record["lr"] for record in records] == pytest.approx(expected)
    assert all("epoch" not in record for record in records)  # synthetic samples never repeat


def test_a_run_on_data_reports_epochs_and_says_before_the_first_step_what_it_reads(
    tmp_path: Path,
) -> None:
    rows = [conversation(f"question {i}", "x" * (i + 20)) for i in range(40)]
    data = create_data_config(tmp_path, write_rows(tmp_path / "rows.jsonl", rows))
    config = create_run_config(tmp_path, data, steps=4, logging_steps=2)
    events: list[Any] = []
    measured: list[int] = []
    loop.train(
        config,
        report=lambda record: events.append(record["epoch"]),
        progress=lambda what, done, total: measured.append(done),
        on_data=events.append,
    )
    (summary,), *epochs = events
    assert measured[-1] == summary.num_samples == 40
    assert epochs == [summary.epochs / 2, summary.epochs]
    assert summary.epochs == 4 * 4 / summary.num_bins


def test_an_evaluation_without_results_is_not_reported(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    settings = [*one_stage(tmp_path, steps=2), "evaluation.eval_steps=1", "logging_steps=2"]
    loop.train(
        override(tiny.recipe(), settings),
        report=records.append,
        evaluate=lambda model, processor, step: {"found": step} if step == 2 else {},
    )
    assert [record.get("found") for record in records] == [None, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def one_stage(folder: Path, *, steps: int) -> list[str]:
    """Return overrides of the recipe tiny: its first stage alone, with a small batch."""
    off = [f"stages.{i}.steps=0" for i in range(1, len(tiny.recipe().stages))]
    small = ["stages.0.global_batch_size=2", "num_workers=0", "num_threads=1"]
    return [f"output_dir={folder}", f"stages.0.steps={steps}", *off, *small]
