"""Text files: byte order marks, line ends of Windows, lists in any layout, other encodings."""

from __future__ import annotations

import codecs
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.formats import SampleError
from qwen2vl.data.sources.source import SampleSource, open_source
from qwen2vl.errors import ConfigError, InputError
from tests.tiny import tiny_tokenizer

ROWS: list[dict[str, Any]] = [{"text": f"page {i} \u00e9"} for i in range(3)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
LIST = json.dumps(ROWS, ensure_ascii=False)
PRETTY = json.dumps(ROWS, ensure_ascii=False, indent=2)


def open_text(path: Path, text: str, encoding: str = "utf-8") -> SampleSource:
    path.write_bytes(text.encode(encoding))
    return open_path(path)


def open_path(path: Path) -> SampleSource:
    source = SourceConfig(path=str(path))
    return open_source(
        source,
        DataConfig(sources=(source,)),
        tokenizer=tiny_tokenizer(),
        cache_dir=path.parent / "cache",
        seed=0,
        default_system=0.0,
    )


def texts(source: SampleSource) -> list[str]:
    return [source.read(i).parts[0] for i in range(len(source))]  # type: ignore[union-attr]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("content", [LINES, LIST, PRETTY], ids=["lines", "list", "pretty"])
def test_files_are_read_alike(
    tmp_path: Path, suffix: str, encoding: str, line_end: str, content: str
) -> None:
    text = (content + "\n").replace("\n", line_end)
    source = open_text(tmp_path / f"rows{suffix}", text, encoding)
    assert texts(source) == [row["text"] for row in ROWS]
    assert source.name(2) == f"rows{suffix}:3"


def test_the_last_line_may_lack_its_end_and_blank_lines_are_counted(tmp_path: Path) -> None:
    source = open_text(tmp_path / "rows.jsonl", LINES.replace("\n", "\r\n\r\n"), "utf-8-sig")
    assert texts(source) == [row["text"] for row in ROWS]
    assert source.name(2) == "rows.jsonl:5"


def test_an_object_of_several_lines_is_one_row(tmp_path: Path) -> None:
    source = open_text(tmp_path / "row.json", json.dumps(ROWS[0], indent=2), "utf-8-sig")
    assert texts(source) == [ROWS[0]["text"]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (LINES + '\n{"text": "cut', 4),
        ('{"text": "cut\n' + LINES, 1),
        ("[1, 2]\n" + LINES, 1),
        ("[\n" + LINES, 1),
    ],
)
def test_a_bad_line_is_one_bad_sample(tmp_path: Path, suffix: str, content: str, line: int) -> None:
    source = open_text(tmp_path / f"rows{suffix}", content)
    bad = []
    for i in range(len(source)):
        try:
            source.read(i)
        except SampleError:
            bad.append(source.name(i))
    assert bad == [f"rows{suffix}:{line}"]
    assert len(source) == 4


def test_lines_of_white_space_are_no_samples(tmp_path: Path) -> None:
    content = " \n\t\r\n" + LINES + "\n   \n" + LINES + "\n\x20"
    source = open_text(tmp_path / "rows.jsonl", content)
    assert len(source) == 6
    assert [source.name(i) for i in (0, 5)] == ["rows.jsonl:3", "rows.jsonl:9"]
    for content in ("", "\n\n", "\ufeff", " "):
        with pytest.raises(InputError, match="holds no line"):
            open_text(tmp_path / "rows.jsonl", content)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_list_that_is_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    for content in (LIST[:-3], PRETTY[:-3]):
        with pytest.raises(InputError, match=rf"rows{suffix} is not JSON: .* is it cut short"):
            open_text(tmp_path / f"rows{suffix}", content)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    "encoding", [f"UTF-{width}{order}" for width in (16, 32) for order in ("", "LE", "BE")]
)
def test_other_encodings_are_refused_with_the_remedy(
    tmp_path: Path, suffix: str, encoding: str
) -> None:
    text = rf"rows{suffix} is in {encoding}, .* `iconv -f {encoding} -t UTF-8 rows{suffix} >"
    with pytest.raises(InputError, match=text):
        open_text(tmp_path / f"rows{suffix}", LINES, encoding)


def test_a_mark_in_the_middle_of_a_file_is_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES.encode() + b"\n" + codecs.BOM_UTF8 + LINES.encode())
    source = open_path(path)
    with pytest.raises(SampleError, match="the line is not JSON"):
        source.read(3)


def test_the_fingerprint_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    plain = open_text(tmp_path / "a.jsonl", LINES)
    marked = open_text(tmp_path / "b.jsonl", LINES, "utf-8-sig")
    assert plain.fingerprint() != marked.fingerprint()


def test_compressed_text_is_named_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(LINES.encode()))
    with pytest.raises(InputError, match="is compressed with gzip: unpack it, as `gunzip < rows"):
        open_path(path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("rows.jsonl.gz", "unpack it first: `gunzip rows.jsonl.gz`"),
        ("rows.csv", 'pandas.read_csv("rows.csv").to_json("rows.jsonl", orient="records", lines='),
        ("rows.tsv", r'pandas.read_csv("rows.tsv", sep="\t").to_json("rows.jsonl"'),
    ],
)
def test_other_kinds_of_files_are_refused_with_their_conversion(
    tmp_path: Path, name: str, remedy: str
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=re.escape(remedy)):
        open_path(tmp_path / name)
