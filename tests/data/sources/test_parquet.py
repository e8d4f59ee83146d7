"""Parquet source, local and remote; damage and random access are tested in test_source.py."""

from __future__ import annotations

import builtins
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest

from qwen2vl.data.sources.parquet import MAX_CACHED_GROUPS, ParquetSource
from qwen2vl.data.storage import Storage
from qwen2vl.errors import ConfigError, InputError
from tests.data.formats.prepared import learned, prepare
from tests.media import encoded, smooth

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

HERE = Storage(backoff_scale=0)


def write(path: Path, count: int, *, group: int = 4, first: int = 0) -> str:
    rows = [{"text": f"page {i}"} for i in range(first, first + count)]
    table = pa.Table.from_pylist(rows) if rows else pa.table({"text": pa.array([], pa.string())})
    pq.write_table(table, path, row_group_size=group)
    return str(path)


def texts(source: ParquetSource, *indices: int) -> list[Any]:
    return [source.read(i).parts[0] for i in indices]  # type: ignore[union-attr]


def test_row_indices_span_row_groups_and_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.parquet", 10), write(tmp_path / "b.parquet", 5, first=10)]
    source = ParquetSource(paths, HERE, str(tmp_path))
    assert len(source) == 15
    assert texts(source, 14, 0, 9, 10) == ["page 14", "page 0", "page 9", "page 10"]
    names = [source.name(i) for i in (0, 9, 10, 14)]
    assert names == ["a.parquet:0", "a.parquet:9", "b.parquet:0", "b.parquet:4"]


def test_row_groups_are_cached_with_lru_eviction(tmp_path: Path) -> None:
    source = ParquetSource([write(tmp_path / "a.parquet", 40)], HERE, "")
    texts(source, *range(40))
    assert len(source._groups) == MAX_CACHED_GROUPS
    last = [group for _, group in source._groups]
    texts(source, 4 * last[0])
    assert [group for _, group in source._groups] == [*last[1:], last[0]]


def test_pickling_drops_file_handles_and_row_groups(tmp_path: Path) -> None:
    source = ParquetSource([write(tmp_path / "a.parquet", 8)], HERE, "")
    texts(source, 0, 5)
    unpickled = pickle.loads(pickle.dumps(source))
    assert not unpickled._handles and not unpickled._groups
    assert texts(unpickled, 5) == ["page 5"]


def test_the_fingerprint_is_of_the_footers(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.parquet", 8, first=n) for n in (0, 1)]
    one, other = (ParquetSource([path], HERE, "").fingerprint() for path in paths)
    assert one != other
    assert ParquetSource(paths[:1], HERE, "elsewhere").fingerprint() == one


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.parquet holds no row"):
        ParquetSource([write(tmp_path / "a.parquet", 0)], HERE, "")


def test_the_error_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = write(tmp_path / "a.parquet", 1), builtins.__import__

    def import_without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_without_pyarrow)
    with pytest.raises(ConfigError, match=r"parquet needs the package pyarrow; pip install"):
        ParquetSource([path], HERE, "")


def test_no_row_is_lost_when_a_connection_is_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = fsspec.filesystem("memory")
    address = f"/{tmp_path.name}/a.parquet"
    system.pipe_file(address, Path(write(tmp_path / "a.parquet", 10)).read_bytes())
    original, requests = type(system).cat_file, Counter[tuple[Any, Any]]()

    def broken(self: Any, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        requests[start, end] += 1
        if requests[start, end] == 1:
            raise ConnectionResetError("peer")
        return original(self, path, start, end, **more)

    monkeypatch.setattr(type(system), "cat_file", broken)
    source = ParquetSource([f"memory:/{address}"], Storage(backoff_scale=0, max_retries=1), "")
    assert texts(source, *range(10)) == [f"page {i}" for i in range(10)]
    assert max(requests.values()) >= 2


def test_chats_as_datasets_writes_them_are_read(tmp_path: Path) -> None:
    """Embedded images, items without a source, and null members of structs."""
    picture = encoded(smooth(56, 84))
    item = {"index": None, "text": None, "type": "image"}
    question = {"index": None, "text": "Color?", "type": "text"}
    answer = {**question, "text": "red"}
    rows = [
        {
            "images": images,
            "messages": [
                {"content": content, "role": "user", "weight": None},
                {"content": [answer], "role": "assistant", "weight": None},
            ],
            "note": None,
        }
        for images, content in (
            ([{"bytes": picture, "path": None}], [item, question]),
            ([{"bytes": picture, "path": None}], [{**item, "index": 0}, question]),
            ([{"bytes": None, "path": None}], [question]),
            (None, [question]),
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = ParquetSource([str(tmp_path / "a.parquet")], HERE, "")
    first, second, third, fourth = (prepare(source.read(i)) for i in range(4))
    assert first.input_ids == second.input_ids and len(first.items) == 1
    assert third.input_ids == fourth.input_ids and not third.items
    assert all(learned(x) == ["red<|im_end|>"] for x in (first, second, third, fourth))
    assert all(source.read(i).unused == () for i in range(4))  # type: ignore[union-attr]
