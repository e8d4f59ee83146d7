"""Dataset mixing by repeats and weights; disk caches shared by the ranks of a machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qwen2vl.data.array_cache import load_or_create, resolve_cache_dir
from qwen2vl.data.bin_planner import mix_sources
from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.errors import ConfigError
from tests.parallel.process_pool import FORKSERVER


def config_with_sources(*fields: dict[str, float]) -> DataConfig:
    return DataConfig(
        sources=tuple(SourceConfig(path=f"{i}.jsonl", **fields) for i, fields in enumerate(fields))
    )


def repeats_by_source(entries: np.ndarray, *sizes: int) -> list[Counter[int]]:
    """Count how often each sample of each source occurs."""
    found, first = [], 0
    for size in sizes:
        source_entries = entries[(entries >= first) & (entries < first + size)] - first
        found.append(Counter(source_entries.tolist()))
        first += size
    return found


def test_by_default_every_sample_occurs_once() -> None:
    assert sorted(mix_sources([5, 7], config_with_sources({}, {}), 0).tolist()) == list(range(12))


def test_fractional_repeats_select_a_fixed_subset() -> None:
    data = config_with_sources({"repeats": 2.5}, {"repeats": 0.1})
    first, second = repeats_by_source(mix_sources([10, 50], data, 0), 10, 50)
    assert Counter(first.values()) == {3: 5, 2: 5}
    assert Counter(second.values()) == {1: 5}
    assert np.array_equal(mix_sources([10, 50], data, 0), mix_sources([10, 50], data, 0))
    assert not np.array_equal(mix_sources([10, 50], data, 0), mix_sources([10, 50], data, 1))


def test_weights_are_shares_of_an_epoch_with_every_sample() -> None:
    data = config_with_sources({"weight": 1}, {"weight": 3})
    small, large = repeats_by_source(mix_sources([10, 90], data, 0), 10, 90)
    assert large.total() == 90 == len(large)
    assert small.total() == 30
    assert set(small.values()) == {3}
    small, large = repeats_by_source(mix_sources([100, 30], data, 0), 100, 30)
    assert (small.total(), large.total()) == (100, 300)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ([{"weight": 1}, {}], "give all of 0, 1 a weight, or none of them"),
        ([{"weight": 1, "repeats": 2}], "only one of them given"),
        ([{"repeats": 0}], "repeats must be positive"),
        ([], "give at least one"),
    ],
)
def test_invalid_repeats_and_weights_are_refused(fields: list[dict[str, float]], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config_with_sources(*fields)


def test_a_source_has_either_a_path_or_a_mixture() -> None:
    with pytest.raises(ConfigError, match="give either a path or a mixture"):
        SourceConfig()
    assert SourceConfig(path="a/b/part-*.jsonl").label == "part-"
    assert SourceConfig(path="s3://bucket/set/").label == "set"


def _load_or_create_in_process(path: Path, log: Path) -> None:
    def create() -> dict[str, np.ndarray]:
        with log.open("a") as file:
            file.write("made\n")
        return {"x": np.arange(5)}

    assert load_or_create(path, create)["x"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.slow  # a dozen processes that import torch
def test_concurrent_ranks_create_a_cache_file_once(tmp_path: Path) -> None:
    paths = (tmp_path / "a" / "x.npz", tmp_path / "log")
    # A fork of a process with threads may hang; one of a server without any does not.
    ranks = [FORKSERVER.Process(target=_load_or_create_in_process, args=paths) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert paths[1].read_text() == "made\n"
    assert [path.name for path in paths[0].parent.glob("*.npz")] == ["x.npz"]


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write cache files: .*data.cache_dir=FOLDER"):
        load_or_create(tmp_path / "file" / "x.npz", dict)


def test_the_default_cache_is_the_user_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert resolve_cache_dir("") == Path("/somewhere/qwen2vl")
    assert resolve_cache_dir("own") == Path("own")
