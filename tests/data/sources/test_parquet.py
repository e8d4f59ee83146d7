"""Parquet by row number, here or elsewhere; damage and reading at random are in test_sources.py."""

from __future__ import annotations

import builtins
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest

from qwen2vl.data.sources.parquet import GROUPS, Parquet
from qwen2vl.data.storage import Storage
from qwen2vl.errors import ConfigError, InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

HERE = Storage(scale=0)


def write(path: Path, count: int, *, group: int = 4, first: int = 0) -> str:
    rows = [{"text": f"page {i}"} for i in range(first, first + count)]
    table = pa.Table.from_pylist(rows) if rows else pa.table({"text": pa.array([], pa.string())})
    pq.write_table(table, path, row_group_size=group)
    return str(path)


def texts(source: Parquet, *indices: int) -> list[Any]:
    return [source.read(i).parts[0] for i in indices]  # type: ignore[union-attr]


def test_rows_are_numbered_through_groups_and_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.parquet", 10), write(tmp_path / "b.parquet", 5, first=10)]
    source = Parquet(paths, HERE, str(tmp_path))
    assert len(source) == 15
    assert texts(source, 14, 0, 9, 10) == ["page 14", "page 0", "page 9", "page 10"]
    names = [source.name(i) for i in (0, 9, 10, 14)]
    assert names == ["a.parquet:0", "a.parquet:9", "b.parquet:0", "b.parquet:4"]


def test_few_row_groups_stay_and_the_last_used_longest(tmp_path: Path) -> None:
    source = Parquet([write(tmp_path / "a.parquet", 40)], HERE, "")
    texts(source, *range(40))
    assert len(source._groups) == GROUPS
    last = [group for _, group in source._groups]
    texts(source, 4 * last[0])
    assert [group for _, group in source._groups] == [*last[1:], last[0]]


def test_a_worker_gets_neither_handles_nor_groups(tmp_path: Path) -> None:
    source = Parquet([write(tmp_path / "a.parquet", 8)], HERE, "")
    texts(source, 0, 5)
    there = pickle.loads(pickle.dumps(source))
    assert not there._handles and not there._groups
    assert texts(there, 5) == ["page 5"]


def test_the_footers_name_the_content(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.parquet", 8, first=n) for n in (0, 1)]
    one, other = (Parquet([path], HERE, "").fingerprint() for path in paths)
    assert one != other
    assert Parquet(paths[:1], HERE, "elsewhere").fingerprint() == one


def test_no_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.parquet holds no row"):
        Parquet([write(tmp_path / "a.parquet", 0)], HERE, "")


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plain = write(tmp_path / "a.parquet", 1), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"parquet needs the package pyarrow; pip install"):
        Parquet([path], HERE, "")


def test_a_store_that_breaks_off_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = fsspec.filesystem("memory")
    address = f"/{tmp_path.name}/a.parquet"
    system.pipe_file(address, Path(write(tmp_path / "a.parquet", 10)).read_bytes())
    plain, asked = type(system).cat_file, Counter[tuple[Any, Any]]()

    def broken(self: Any, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        asked[start, end] += 1
        if asked[start, end] == 1:
            raise ConnectionResetError("peer")
        return plain(self, path, start, end, **more)

    monkeypatch.setattr(type(system), "cat_file", broken)
    source = Parquet([f"memory:/{address}"], Storage(scale=0, retries=1), "")
    assert texts(source, *range(10)) == [f"page {i}" for i in range(10)]
    assert max(asked.values()) >= 2
