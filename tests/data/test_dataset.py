"""PackedDataset: what its fingerprint depends on, and eviction from the disk cache."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.data import dataset
from qwen2vl.data.config import IO_OPTIONS
from qwen2vl.data.dataset import PackedDataset
from tests.data.rows import conversation, create_data_config, write_rows
from tests.media import encoded, smooth
from tests.tiny import tiny_processor

PRESET = "qwen_vl_utils_0_0_14"

OTHER_VALUES: dict[str, Any] = {
    **{"max_bad_fraction": 0.5, "frame_cache_gb": 0.5, "decode_timeout": 1.0, "fetch_timeout": 1.0},
    **{"max_retries": 1, "concurrency": 2, "cache_dir": "elsewhere"},
    **{
        "max_tokens": 256,
        "global_batch_size": 1,
        "oversize": "drop",
        "max_frames": 9,
        "video_preset": PRESET,
    },
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_only_io_options_leave_the_fingerprint_unchanged(tmp_path: Path, name: str) -> None:
    rows = [conversation("q", "a" * i) for i in range(1, 40)]
    data = create_data_config(tmp_path, write_rows(tmp_path / "rows.jsonl", rows))
    value = str(tmp_path / "elsewhere") if name == "cache_dir" else OTHER_VALUES[name]
    one, two = (
        PackedDataset.open(given, tiny_processor(), seed=0).fingerprint
        for given in (data, replace(data, **{name: value}))
    )
    assert (one == two) == (name in IO_OPTIONS)


def test_every_io_option_is_tested() -> None:
    assert OTHER_VALUES.keys() >= IO_OPTIONS


def test_files_that_a_run_opens_again_are_not_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "CACHE_LIMITS", dict.fromkeys(dataset.CACHE_LIMITS, 0))
    rows = write_rows(tmp_path / "rows.jsonl", [conversation("q", "a" * i) for i in range(1, 40)])
    data = create_data_config(tmp_path, rows)
    cache = PackedDataset.open(data, tiny_processor(), seed=0).cache_dir
    used = [*cache.glob("lengths/**/*.npz"), *cache.glob("plans/*.npz")]
    assert len(used) == 2
    for number, path in enumerate(used):
        os.link(path, tmp_path / f"{number}")  # a second link identifies the file
    unused = cache / "plans" / "unused.npz"
    unused.write_bytes(b"x")
    for path in (*used, unused):
        os.utime(path, (1, 1))
    PackedDataset.open(data, tiny_processor(), seed=0)
    assert all(path.samefile(tmp_path / f"{number}") for number, path in enumerate(used))
    assert not unused.exists()


def test_a_medium_of_another_shape_than_measured_is_bad_even_if_its_tokens_are_as_many(
    tmp_path: Path,
) -> None:
    image = smooth(112, 224)
    (tmp_path / "a.png").write_bytes(encoded(image))
    rows = write_rows(tmp_path / "rows.jsonl", [conversation("<image>q", "a", image="a.png")])
    data = create_data_config(tmp_path, rows, global_batch_size=1)
    opened = PackedDataset.open(data, tiny_processor(), seed=0)
    assert not opened.read([0])[1]
    (tmp_path / "a.png").write_bytes(encoded(image.transpose(1, 0, 2)))
    examples, (bad,) = opened.read([0])
    assert (examples, bad.reason) == ([], "length")
    expected = "media of [(1, 16, 8)] patches (t, h, w), their headers gave [(1, 8, 16)]"
    assert bad.text.startswith(expected)
