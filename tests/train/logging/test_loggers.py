"""Sinks: lines become named numbers; what is missing is said with the words that help."""

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
from qwen2vl.train.logging.loggers import open_sinks, scalars

LINE: Mapping[str, Any] = {
    "step": 3,
    "stage": "see",
    "loss": 1.5,
    "families": {"text": {"loss": 2.0, "examples": 4}},
    "phases": {"data": float("nan")},
    "late": True,
    "mfu": None,
}


def config(folder: Path, **words: Any) -> TrainConfig:
    return replace(tiny.recipe(), out=str(folder), **words)


def test_a_line_becomes_named_finite_numbers() -> None:
    assert scalars(LINE) == {
        "step": 3.0,
        "loss": 1.5,
        "families/text/loss": 2.0,
        "families/text/examples": 4.0,
    }


def test_json_lines_alone_need_no_sink(tmp_path: Path) -> None:
    assert open_sinks(config(tmp_path)) == []


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = open_sinks(config(tmp_path, log="tensorboard"))
    sink(LINE)
    sink({**LINE, "step": 4, "loss": 1.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 1.5), (4, 1.25)]
    assert "families/text/loss" in events.Tags()["scalars"]


def test_wandb_hears_numbers_at_their_step_and_resumes_by_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int]] = []

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        return SimpleNamespace(log=lambda numbers, step: logged.append((numbers, step)))

    fake = ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined] - a stand-in
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        (sink,) = open_sinks(config(tmp_path, log="wandb"))
    sink(LINE)
    assert logged == [(scalars(LINE), 3)]
    first, again = begun
    assert first["id"] == again["id"] and first["resume"] == "allow"
    assert first["config"]["name"] == first["name"] == "tiny"
    open_sinks(config(tmp_path / "other", log="wandb"))
    assert begun[-1]["id"] != first["id"]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=rf"log={package}: .*pip install 'qwen2vl\[{package}\]'"):
        open_sinks(config(tmp_path, log=package))
