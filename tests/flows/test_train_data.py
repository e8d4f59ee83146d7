"""Training on data files: the loss falls, sources are logged, resuming equals uninterrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.recipes import tiny
from qwen2vl.recipes.nano import TRAIN_ALL
from qwen2vl.train import loop
from qwen2vl.train.config import Stage, TrainConfig
from tests.data.rows import conversation, good_rows, write_media, write_rows

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_media(folder)
    missing = conversation("<image>what?", "nothing", image="none.png")
    write_rows(folder / "pictures.jsonl", [*good_rows(), missing])
    write_rows(folder / "words.jsonl", [{"text": "word " * i} for i in range(1, 30)])
    return folder


def config_in(folder: Path, name: str, **fields: Any) -> TrainConfig:
    data = DataConfig(
        sources=tuple(SourceConfig(path=str(folder / f"{n}.jsonl")) for n in ("pictures", "words")),
        max_tokens=512,
        global_batch_size=2,
        max_bad_fraction=0.1,
        cache_dir=str(folder / "cache"),
    )
    given = {
        "stages": (Stage(name="read", steps=STEPS, data=data, rules=TRAIN_ALL),),
        "output_dir": str(folder / name),
        "num_workers": 0,
        "num_threads": 1,
        "logging_steps": 1,
        "save_steps": 1,
    }
    return replace(tiny.recipe(), **{**given, **fields})


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(folder: Path) -> None:
    lines: list[dict[str, Any]] = []
    whole = loop.train(config_in(folder, "whole"), report=lines.append)
    assert {family for line in lines for family in line["families"]} == {"pictures", "words"}
    assert lines[-1]["loss"] < lines[0]["loss"]

    class KilledError(Exception):
        pass

    def kill(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        loop.train(config_in(folder, "parts"), report=kill)
    parts = loop.train(config_in(folder, "parts", num_workers=1))
    one, two = (load_file(model / "model.safetensors") for model in (whole, parts))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert one.keys() == two.keys()
