"""Loggers: records become named scalars; a missing package is named with its remedy."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.recipes import tiny
from qwen2vl.train.config import TrainConfig
from qwen2vl.train.logging.loggers import flatten_scalars, open_loggers

RECORD: Mapping[str, Any] = {
    "step": 3,
    "stage": "see",
    "loss": 1.5,
    "families": {"text": {"loss": 2.0, "examples": 4}},
    "phases": {"data": float("nan")},
    "late": True,
    "mfu": None,
}


def create_config(folder: Path, **fields: Any) -> TrainConfig:
    return replace(tiny.recipe(), output_dir=str(folder), **fields)


def test_a_record_is_flattened_to_finite_scalars() -> None:
    assert flatten_scalars(RECORD) == {
        "step": 3.0,
        "loss": 1.5,
        "families/text/loss": 2.0,
        "families/text/examples": 4.0,
    }


def test_jsonl_alone_needs_no_logger(tmp_path: Path) -> None:
    assert open_loggers(create_config(tmp_path)) == []


def test_tensorboard_reads_the_logged_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logger,) = open_loggers(create_config(tmp_path, report_to="tensorboard"))
    logger(RECORD)
    logger({**RECORD, "step": 4, "loss": 1.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 1.5), (4, 1.25)]
    assert "families/text/loss" in events.Tags()["scalars"]


def test_wandb_logs_by_step_and_resumes_by_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_calls: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int]] = []

    def init(**options: Any) -> SimpleNamespace:
        init_calls.append(options)
        return SimpleNamespace(log=lambda numbers, step: logged.append((numbers, step)))

    fake_wandb = ModuleType("wandb")
    fake_wandb.init = init  # type: ignore[attr-defined] - a stand-in
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb)
    for _ in range(2):
        (logger,) = open_loggers(create_config(tmp_path, report_to="wandb"))
    logger(RECORD)
    assert logged == [(flatten_scalars(RECORD), 3)]
    first, again = init_calls
    assert first["id"] == again["id"] and first["resume"] == "allow"
    assert first["config"]["name"] == first["name"] == "tiny"
    open_loggers(create_config(tmp_path / "other", report_to="wandb"))
    assert init_calls[-1]["id"] != first["id"]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ConfigError, match=rf"report_to={package}: .*pip install 'qwen2vl\[{package}\]'"
    ):
        open_loggers(create_config(tmp_path, report_to=package))
