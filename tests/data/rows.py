"""A small data folder with all kinds of samples, and a run config that reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.recipes import tiny
from qwen2vl.train.config import Stage, TrainConfig
from tests.media import encoded, encoded_video, smooth


def conversation(question: str, answer: str, **media: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **media}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_media(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(5):
        (folder / f"{i}.png").write_bytes(encoded(smooth(60 + 30 * i, 100, i)))
    (folder / "clip.mp4").write_bytes(encoded_video(12))


def good_rows() -> list[dict[str, Any]]:
    """One image, two, a video, text only, a document; answers of many lengths."""
    rows = [conversation("<image>\nwhat?", "x" * (1 + i), image=f"{i % 5}.png") for i in range(20)]
    rows += [conversation("hello", "y" * (1 + 3 * i)) for i in range(15)]
    rows += [
        conversation("<image><image>same?", "no", images=[f"{i}.png", f"{i + 1}.png"])
        for i in range(4)
    ]
    rows.append(conversation("<video>where to?", "left", video="clip.mp4"))
    rows.append({"text": "<image> A page of words.", "image": "1.png"})
    return rows


def create_data_config(folder: Path, *paths: Path, **fields: Any) -> DataConfig:
    sources = tuple(SourceConfig(path=str(path)) for path in paths)
    defaults = {
        "sources": sources,
        "max_tokens": 512,
        "global_batch_size": 4,
        "cache_dir": str(folder / "cache"),
    }
    return DataConfig(**{**defaults, **fields})


def create_run_config(
    folder: Path, data: DataConfig, *, steps: int = 8, **fields: Any
) -> TrainConfig:
    """Derive a run of one stage from the recipe tiny."""
    stage = Stage(name="read", steps=steps, data=data)
    defaults = {"num_workers": 0, "output_dir": str(folder / "run"), "stages": (stage,)}
    return replace(tiny.recipe(), **{**defaults, **fields})
