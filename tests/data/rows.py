"""A small folder of data with all kinds of samples, and a run that reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.recipes import tiny
from qwen2vl.train.config import Stage, TrainConfig
from tests.media import clip, encoded, smooth


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
    (folder / "clip.mp4").write_bytes(clip(12))


def good_rows() -> list[dict[str, Any]]:
    """One picture, two, a clip, text alone, a page; answers of many lengths."""
    rows = [conversation("<image>\nwhat?", "x" * (1 + i), image=f"{i % 5}.png") for i in range(20)]
    rows += [conversation("hello", "y" * (1 + 3 * i)) for i in range(15)]
    rows += [
        conversation("<image><image>same?", "no", images=[f"{i}.png", f"{i + 1}.png"])
        for i in range(4)
    ]
    rows.append(conversation("<video>where to?", "left", video="clip.mp4"))
    rows.append({"text": "<image> A page of words.", "image": "1.png"})
    return rows


def data_of(folder: Path, *paths: Path, **fields: Any) -> DataConfig:
    sources = tuple(Source(path=str(path)) for path in paths)
    given = {"sources": sources, "max_tokens": 512, "bins": 4, "cache": str(folder / "cache")}
    return DataConfig(**{**given, **fields})


def run_of(folder: Path, data: DataConfig, *, steps: int = 8, **fields: Any) -> TrainConfig:
    """Derive a run of one stage from the recipe tiny."""
    stage = Stage(name="read", steps=steps, data=data)
    given = {"workers": 0, "out": str(folder / "run"), "stages": (stage,)}
    return replace(tiny.recipe(), **{**given, **fields})
