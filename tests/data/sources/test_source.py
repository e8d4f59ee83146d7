"""Sample sources: lines, lists, parquet and remote files read alike, in any order; errors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pytest

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.dataset import PackedDataset
from qwen2vl.data.formats import SampleError
from qwen2vl.data.lengths import measure_sample
from qwen2vl.data.preprocess import HeaderPreprocessor, SamplePreprocessor
from qwen2vl.data.sources import parquet
from qwen2vl.data.sources.source import SampleSource, open_source
from qwen2vl.data.storage import Storage
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.processor.messages import parse_messages
from qwen2vl.synth import Mixture
from tests.data.rows import conversation, create_data_config, write_rows
from tests.media import encoded, smooth
from tests.tiny import tiny_processor, tiny_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"id": i, "text": f"page {i}", "more": None} for i in range(10)]


def open_path(path: Path | str, folder: Path, **fields: Any) -> SampleSource:
    source = SourceConfig(path=str(path), **fields)
    return open_source(
        source,
        DataConfig(sources=(source,), max_tokens=64),
        tokenizer=tiny_tokenizer(),
        cache_dir=folder / "cache",
        seed=0,
        default_system=0.5,
    )


def texts(source: SampleSource) -> list[str]:
    samples = {i: source.read(i) for i in reversed(range(len(source)))}
    return [samples[i].parts[0] for i in range(len(source))]  # type: ignore[union-attr]


def write_parquet(path: Path, rows: list[dict[str, Any]], *, group: int = 4) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.mark.parametrize("kind", ["lines", "list", "parquet", "address"])
def test_all_file_formats_give_the_same_samples(tmp_path: Path, kind: str) -> None:
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
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)  # as in a worker
    assert source.fingerprint() == open_path(path, tmp_path).fingerprint()
    names = {"parquet": "rows.parquet:2", "list": "rows.json:3"}
    assert source.name(2) == names.get(kind, "rows.jsonl:3")


def test_a_pattern_or_a_folder_is_all_its_files_sorted(tmp_path: Path) -> None:
    for i in range(3):
        write_rows(tmp_path / "parts" / f"part-{2 - i}.jsonl", ROWS[i : i + 2])
    expected = ["page 2", "page 3", "page 1", "page 2", "page 0", "page 1"]
    assert texts(open_path(tmp_path / "parts", tmp_path)) == expected
    source = open_path(f"{tmp_path}/parts/part-*.jsonl", tmp_path)
    assert texts(source) == expected
    assert source.name(3) == "part-1.jsonl:2"


def test_the_fingerprint_changes_with_the_content(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    before = open_path(path, tmp_path).fingerprint()
    assert open_path(write_rows(path, ROWS[1:]), tmp_path).fingerprint() != before


def test_remote_text_is_copied_once_per_version(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    address = f"/{tmp_path.name}/rows.jsonl"
    for letter in "ab":  # of the same size
        system.pipe_file(address, b'{"text": "%s"}\n' % letter.encode())
        for _ in range(2):
            assert texts(open_path(f"memory:/{address}", tmp_path)) == [letter]
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 2


def test_images_embedded_in_parquet_are_read(tmp_path: Path) -> None:
    image = {"bytes": encoded(smooth(56, 84)), "path": "a.png"}
    row = {"images": [image], "texts": [{"user": "what?", "assistant": "a cat"}]}
    source = open_path(write_parquet(tmp_path / "rows.parquet", [row] * 3), tmp_path)
    processed = SamplePreprocessor(
        tiny_processor(), DataConfig(sources=(SourceConfig(path="x"),))
    ).prepare(source.read(1))
    assert [item.resized_size for item in processed.items] == [(56, 84)]


def test_a_truncated_parquet_file_is_refused_on_opening(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"rows.parquet cannot be read as parquet: .*cut short"):
        open_path(path, tmp_path)
    with pytest.raises(InputError, match=r"none.parquet: no such file"):
        open_path(tmp_path / "none.parquet", tmp_path)


def test_the_number_of_open_parquet_files_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles: list[BinaryIO] = []
    original = Storage.open

    def recording_open(self: Storage, address: str) -> BinaryIO:
        handles.append(original(self, address))
        return handles[-1]

    monkeypatch.setattr(Storage, "open", recording_open)
    count = parquet.MAX_OPEN_FILES + 4
    for i in range(count):
        write_parquet(tmp_path / "parts" / f"{i:02d}.parquet", [{"text": f"page {i}"}])
    source = open_path(tmp_path / "parts", tmp_path)
    assert all(handle.closed for handle in handles)
    for _ in range(2):
        assert texts(source) == [f"page {i}" for i in range(count)]
    assert sum(not handle.closed for handle in handles) == parquet.MAX_OPEN_FILES


def test_a_damaged_row_group_affects_its_rows_only(tmp_path: Path) -> None:
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


def test_files_of_mixed_formats_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "set" / "rows.jsonl", ROWS)
    write_parquet(tmp_path / "set" / "rows.parquet", ROWS)
    with pytest.raises(ConfigError, match="give files of one kind"):
        open_path(tmp_path / "set", tmp_path)


def test_remote_media_are_measured_by_their_headers(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for i in range(3):
        system.pipe_file(f"/{tmp_path.name}/{i}.png", encoded(smooth(56 + 28 * i, 84)))
    rows = [conversation("<image>what?", "x", image=f"{i}.png") for i in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    sources = (SourceConfig(path=str(path), media_root=f"memory://{tmp_path.name}"),)
    data = create_data_config(
        tmp_path, sources=sources, max_bad_fraction=0.5, global_batch_size=1, max_retries=0
    )
    dataset = PackedDataset.open(data, tiny_processor(), seed=0)
    examples, bad = dataset.read(range(4))
    assert [e.input.items[0].resized_size for e in examples] == [(56, 84), (84, 84), (112, 84)]
    assert [(b.id, b.reason) for b in bad] == [("rows.jsonl:4", "missing")]


def test_synthetic_samples_are_measured_without_rendering(tmp_path: Path) -> None:
    families = {"shapes": 1.0, "motion": 1.0, "grounding": 1.0, "text_only": 1.0}
    mixture = Mixture(weights=families, canvas=(56, 112), clip_canvas=(56, 84))
    data = DataConfig(sources=(SourceConfig(mixture=mixture, num_samples=12),))
    source = open_source(
        data.sources[0],
        data,
        tokenizer=tiny_tokenizer(),
        cache_dir=tmp_path,
        seed=3,
        default_system=0.5,
    )
    assert len(source) == 12
    for i in range(12):
        measured = measure_sample(
            source.read(i, pixels=False), HeaderPreprocessor(tiny_processor(), data)
        )
        processed = SamplePreprocessor(tiny_processor(), data).prepare(source.read(i))
        assert measured.bad is None
        assert (measured.tokens, list(measured.grids)) == (
            len(processed.input_ids),
            processed.grids,
        )
    assert parse_messages(source.read(0).messages)  # type: ignore[union-attr]
