"""What names a stage's data: all that decides what a step sees, and no manners; what stays kept."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.data import dataset
from qwen2vl.data.config import MANNERS
from qwen2vl.data.dataset import Corpus
from tests.data.rows import conversation, data_of, write_rows
from tests.tiny import tiny_processor

PRESET = "qwen_vl_utils_0_0_14"

OTHERS: dict[str, Any] = {
    **{"max_bad": 0.5, "cache_gb": 0.5, "decode_seconds": 1.0, "fetch_seconds": 1.0},
    **{"retries": 1, "concurrency": 2, "cache": "elsewhere"},
    **{"max_tokens": 256, "bins": 1, "oversize": "drop", "max_frames": 9, "video_preset": PRESET},
}


@pytest.mark.parametrize("name", OTHERS)
def test_manners_and_nothing_else_leave_a_fingerprint_as_it_is(tmp_path: Path, name: str) -> None:
    rows = [conversation("q", "a" * i) for i in range(1, 40)]
    data = data_of(tmp_path, write_rows(tmp_path / "rows.jsonl", rows))
    value = str(tmp_path / "elsewhere") if name == "cache" else OTHERS[name]
    one, two = (
        Corpus.open(given, tiny_processor(), seed=0).fingerprint
        for given in (data, replace(data, **{name: value}))
    )
    assert (one == two) == (name in MANNERS)


def test_every_manner_is_tried() -> None:
    assert OTHERS.keys() >= MANNERS


def test_what_a_run_opens_again_outlives_any_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "KEPT", dict.fromkeys(dataset.KEPT, 0))
    rows = write_rows(tmp_path / "rows.jsonl", [conversation("q", "a" * i) for i in range(1, 40)])
    data = data_of(tmp_path, rows)
    cache = Corpus.open(data, tiny_processor(), seed=0).cache
    own = [*cache.glob("lengths/**/*.npz"), *cache.glob("plans/*.npz")]
    assert len(own) == 2
    for number, path in enumerate(own):
        os.link(path, tmp_path / f"{number}")  # a second name, to know the file by
    stranger = cache / "plans" / "stranger.npz"
    stranger.write_bytes(b"x")
    for path in (*own, stranger):
        os.utime(path, (1, 1))
    Corpus.open(data, tiny_processor(), seed=0)
    assert all(path.samefile(tmp_path / f"{number}") for number, path in enumerate(own))
    assert not stranger.exists()
