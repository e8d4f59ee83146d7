"""Sources: lines, lists, parquet and addresses read alike, in any order; damage is one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pytest

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.data.dataset import Corpus
from qwen2vl.data.formats import SampleError
from qwen2vl.data.lengths import size_of
from qwen2vl.data.preprocess import Measurer, Preparer
from qwen2vl.data.sources import parquet
from qwen2vl.data.sources.source import Samples, open_source
from qwen2vl.data.storage import Storage
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.processor.messages import normalize
from qwen2vl.synth import Mixture
from tests.data.rows import conversation, data_of, write_rows
from tests.media import encoded, smooth
from tests.tiny import tiny_processor, tiny_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"id": i, "text": f"page {i}", "more": None} for i in range(10)]


def open_path(path: Path | str, folder: Path, **fields: Any) -> Samples:
    source = Source(path=str(path), **fields)
    return open_source(
        source,
        DataConfig(sources=(source,), max_tokens=64),
        tokenizer=tiny_tokenizer(),
        cache=folder / "cache",
        seed=0,
        default_system=0.5,
    )


def texts(source: Samples) -> list[str]:
    backwards = {i: source.read(i) for i in reversed(range(len(source)))}
    return [backwards[i].parts[0] for i in range(len(source))]  # type: ignore[union-attr]


def write_parquet(path: Path, rows: list[dict[str, Any]], *, group: int = 4) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.mark.parametrize("kind", ["lines", "list", "parquet", "address"])
def test_all_kinds_of_files_hold_the_same(tmp_path: Path, kind: str) -> None:
    if kind == "lines":
        path: Path | str = write_rows(tmp_path / "rows.jsonl", ROWS)
    elif kind == "list":
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        path = write_parquet(tmp_path / "rows.parquet", ROWS)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/rows.jsonl", lines)
        path = f"memory://{tmp_path.name}/rows.jsonl"
    source = open_path(path, tmp_path)
    assert texts(source) == [f"page {i}" for i in range(10)]
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)  # as workers get it
    assert source.fingerprint() == open_path(path, tmp_path).fingerprint()
    name = "rows.parquet:2" if kind == "parquet" else "rows.jsonl:3"
    assert source.name(2).endswith(name)


def test_a_pattern_or_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    for i in range(3):
        write_rows(tmp_path / "parts" / f"part-{2 - i}.jsonl", ROWS[i : i + 2])
    wanted = ["page 2", "page 3", "page 1", "page 2", "page 0", "page 1"]
    assert texts(open_path(tmp_path / "parts", tmp_path)) == wanted
    source = open_path(f"{tmp_path}/parts/part-*.jsonl", tmp_path)
    assert texts(source) == wanted
    assert source.name(3) == "part-1.jsonl:2"


def test_another_content_has_another_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    before = open_path(path, tmp_path).fingerprint()
    assert open_path(write_rows(path, ROWS[1:]), tmp_path).fingerprint() != before


def test_words_from_elsewhere_are_brought_once_for_each_version(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    address = f"/{tmp_path.name}/rows.jsonl"
    for letter in "ab":  # of the same size
        system.pipe_file(address, b'{"text": "%s"}\n' % letter.encode())
        for _ in range(2):
            assert texts(open_path(f"memory:/{address}", tmp_path)) == [letter]
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 2


def test_parquet_brings_its_pictures_along(tmp_path: Path) -> None:
    picture = {"bytes": encoded(smooth(56, 84)), "path": "a.png"}
    row = {"images": [picture], "texts": [{"user": "what?", "assistant": "a cat"}]}
    source = open_path(write_parquet(tmp_path / "rows.parquet", [row] * 3), tmp_path)
    made = Preparer(tiny_processor(), DataConfig(sources=(Source(path="x"),))).prepare(
        source.read(1)
    )
    assert [item.size_seen for item in made.items] == [(56, 84)]


def test_a_parquet_file_that_is_cut_short_is_refused_at_the_start(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"rows.parquet cannot be read as parquet: .*cut short"):
        open_path(path, tmp_path)
    with pytest.raises(InputError, match=r"none.parquet: no such file"):
        open_path(tmp_path / "none.parquet", tmp_path)


def test_of_many_parquet_files_few_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles: list[BinaryIO] = []
    plain = Storage.open

    def told(self: Storage, address: str) -> BinaryIO:
        handles.append(plain(self, address))
        return handles[-1]

    monkeypatch.setattr(Storage, "open", told)
    count = parquet.HANDLES + 4
    for i in range(count):
        write_parquet(tmp_path / "parts" / f"{i:02d}.parquet", [{"text": f"page {i}"}])
    source = open_path(tmp_path / "parts", tmp_path)
    assert all(handle.closed for handle in handles)
    for _ in range(2):
        assert texts(source) == [f"page {i}" for i in range(count)]
    assert sum(not handle.closed for handle in handles) == parquet.HANDLES


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    rows = [{"text": f"{i}" * 2000} for i in range(8)]
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, path, row_group_size=4, write_page_checksum=True, compression="gzip")
    raw = bytearray(path.read_bytes())
    raw[30:60] = bytes(30)
    path.write_bytes(raw)
    source = open_path(path, tmp_path)
    with pytest.raises(SampleError, match="the row group cannot be read"):
        source.read(0)
    assert source.read(5).parts == ("5" * 2000,)  # type: ignore[union-attr]


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "set" / "rows.jsonl", ROWS)
    write_parquet(tmp_path / "set" / "rows.parquet", ROWS)
    with pytest.raises(ConfigError, match="give files of one kind"):
        open_path(tmp_path / "set", tmp_path)


def test_media_may_lie_at_an_address_and_are_measured_by_their_heads(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for i in range(3):
        system.pipe_file(f"/{tmp_path.name}/{i}.png", encoded(smooth(56 + 28 * i, 84)))
    rows = [conversation("<image>what?", "x", image=f"{i}.png") for i in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    sources = (Source(path=str(path), media=f"memory://{tmp_path.name}"),)
    data = data_of(tmp_path, sources=sources, max_bad=0.5, bins=1, retries=0)
    corpus = Corpus.open(data, tiny_processor(), seed=0)
    examples, bad = corpus.read(range(4))
    assert [e.input.items[0].size_seen for e in examples] == [(56, 84), (84, 84), (112, 84)]
    assert [(b.id, b.reason) for b in bad] == [("rows.jsonl:4", "missing")]


def test_the_world_is_measured_without_drawing(tmp_path: Path) -> None:
    families = {"shapes": 1.0, "motion": 1.0, "grounding": 1.0, "text_only": 1.0}
    mixture = Mixture(weights=families, canvas=(56, 112), clip_canvas=(56, 84))
    data = DataConfig(sources=(Source(mixture=mixture, samples=12),))
    source = open_source(
        data.sources[0],
        data,
        tokenizer=tiny_tokenizer(),
        cache=tmp_path,
        seed=3,
        default_system=0.5,
    )
    assert len(source) == 12
    for i in range(12):
        measured = size_of(source.read(i, pixels=False), Measurer(tiny_processor(), data))
        made = Preparer(tiny_processor(), data).prepare(source.read(i))
        assert measured.bad is None
        assert (measured.tokens, list(measured.grids)) == (len(made.input_ids), made.grids)
    assert normalize(source.read(0).messages)  # type: ignore[union-attr]
