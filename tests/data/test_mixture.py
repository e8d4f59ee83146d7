"""A pass: repeats, weights, fixed fractions; and what many ranks of a machine share on disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.data.disk_cache import cache_folder, keep
from qwen2vl.data.mixture import mix
from qwen2vl.errors import ConfigError
from tests.parallel.gang import FORKS


def data_with(*fields: dict[str, float]) -> DataConfig:
    return DataConfig(
        sources=tuple(Source(path=f"{i}.jsonl", **own) for i, own in enumerate(fields))
    )


def counts_of(entries: np.ndarray, *sizes: int) -> list[Counter[int]]:
    """Count how often each sample of each source comes."""
    found, first = [], 0
    for size in sizes:
        own = entries[(entries >= first) & (entries < first + size)] - first
        found.append(Counter(own.tolist()))
        first += size
    return found


def test_without_shares_every_sample_comes_once() -> None:
    assert sorted(mix([5, 7], data_with({}, {}), 0).tolist()) == list(range(12))


def test_repeats_are_whole_and_a_fixed_fraction() -> None:
    data = data_with({"repeats": 2.5}, {"repeats": 0.1})
    first, second = counts_of(mix([10, 50], data, 0), 10, 50)
    assert Counter(first.values()) == {3: 5, 2: 5}
    assert Counter(second.values()) == {1: 5}
    assert np.array_equal(mix([10, 50], data, 0), mix([10, 50], data, 0))
    assert not np.array_equal(mix([10, 50], data, 0), mix([10, 50], data, 1))


def test_weights_are_shares_of_a_pass_in_which_every_sample_comes() -> None:
    data = data_with({"weight": 1}, {"weight": 3})
    small, large = counts_of(mix([10, 90], data, 0), 10, 90)
    assert large.total() == 90 == len(large)
    assert small.total() == 30
    assert set(small.values()) == {3}
    small, large = counts_of(mix([100, 30], data, 0), 100, 30)
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
def test_shares_that_mean_nothing_are_refused(fields: list[dict[str, float]], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        data_with(*fields)


def test_a_source_is_a_path_or_a_piece_of_the_world() -> None:
    with pytest.raises(ConfigError, match="give either a path or a mixture"):
        Source()
    assert Source(path="a/b/part-*.jsonl").label == "part-"
    assert Source(path="s3://bucket/set/").label == "set"


def _wanting(path: Path, log: Path) -> None:
    def make() -> dict[str, np.ndarray]:
        with log.open("a") as file:
            file.write("made\n")
        return {"x": np.arange(5)}

    assert keep(path, make)["x"].tolist() == [0, 1, 2, 3, 4]


def test_of_many_ranks_one_makes_and_the_others_wait(tmp_path: Path) -> None:
    paths = (tmp_path / "a" / "x.npz", tmp_path / "log")
    # A fork of a process with threads may hang; one of a server without any does not.
    ranks = [FORKS.Process(target=_wanting, args=paths) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert paths[1].read_text() == "made\n"
    assert [path.name for path in paths[0].parent.glob("*.npz")] == ["x.npz"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"nothing can be kept here: .*data.cache=FOLDER"):
        keep(tmp_path / "file" / "x.npz", dict)


def test_things_are_kept_in_the_user_s_cache_unless_said_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder("") == Path("/somewhere/qwen2vl")
    assert cache_folder("own") == Path("own")
