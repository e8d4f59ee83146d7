"""RecordFile: appending, resuming from a file that was cut at any byte, locks, foreign files."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.errors import InputError
from qwen2vl.server.batch.record_file import RecordFile, to_json_line

COLUMNS = ("image", "answer", "id")
RECORDS = [
    {"image": "a.png", "answer": "plain", "id": "1"},
    {"image": "b,c.png", "answer": 'a "quoted" text,\nof two lines', "id": "2"},
    {"image": "\u00e9.png", "answer": '"', "id": "3"},
    {"image": "d.png", "answer": "\r\n\n", "id": "4"},
    {"image": "e.png", "answer": "", "id": "5"},
]


def read_all(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read a file as its users do."""
    text = path.read_bytes().decode()
    if not columns:
        return [json.loads(line) for line in text.split("\n")[:-1]]
    return list(csv.DictReader(io.StringIO(text, newline="")))


def write(path: Path, columns: tuple[str, ...], records: list[dict[str, Any]]) -> list[Any]:
    """Append records to a file, and return those that it had."""
    found: list[Any] = []
    with RecordFile(path, columns=columns, on_record=lambda _, one: found.append(one)) as file:
        for record in records:
            file.append(file.to_row(record))
    return found


@pytest.mark.parametrize("columns", [(), COLUMNS], ids=["jsonl", "csv"])
def test_a_file_cut_at_any_byte_is_resumed(tmp_path: Path, columns: tuple[str, ...]) -> None:
    path = tmp_path / "records"
    assert write(path, columns, RECORDS) == []
    whole = path.read_bytes()
    assert read_all(path, columns) == RECORDS
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        found: list[dict[str, Any]] = []
        with RecordFile(path, columns=columns, on_record=lambda _, r, f=found: f.append(r)) as file:
            assert found == RECORDS[: len(found)], size
            for record in RECORDS[len(found) :]:
                file.append(file.to_row(record))
        assert path.read_bytes() == whole, size
        assert len(found) == len(RECORDS) or size < len(whole)


def test_zeros_after_a_power_failure_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(to_json_line({"id": "1"}) + bytes(4096))
    assert write(path, (), [{"id": "2"}]) == [{"id": "1"}]
    assert read_all(path, ()) == [{"id": "1"}, {"id": "2"}]


@pytest.mark.parametrize("content", [b"no JSON\n", b"[1]\n", b"\xff\n", b"\n"])
def test_a_foreign_file_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "records"
    content = to_json_line({"id": "1"}) + content + b"cut"
    path.write_bytes(content)
    with pytest.raises(InputError, match="line 2 was not written by this command; give another"):
        write(path, (), [])
    assert path.read_bytes() == content


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    write(path, COLUMNS, RECORDS)
    with pytest.raises(InputError, match="its first line is not image,answer,boxes,id"):
        write(path, ("image", "answer", "boxes", "id"), [])


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records"
    with RecordFile(path), pytest.raises(InputError, match="another process writes this file"):
        write(path, (), [])
    write(path, (), [])  # and not later


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder .* does not exist; make it first"):
        write(tmp_path / "none" / "records", (), [])
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        write(tmp_path, (), [])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe or a device"):
        write(tmp_path / "pipe", (), [])


def test_a_record_is_whole_or_absent_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.write, 0

    def write_some(descriptor: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:5])

    path = tmp_path / "records"
    write(path, (), [{"id": "1"}])
    with RecordFile(path) as file:
        monkeypatch.setattr(os, "write", write_some)
        with pytest.raises(InputError, match="No space left on device; the same command") as caught:
            file.append(to_json_line({"id": "2"}))
        assert isinstance(caught.value.__cause__, OSError)
        assert read_all(path, ()) == [{"id": "1"}]
        calls = 2
        file.append(to_json_line({"id": "3"}))  # in pieces of 5 bytes
    assert read_all(path, ()) == [{"id": "1"}, {"id": "3"}]


def test_names_that_are_not_unicode_are_escaped(tmp_path: Path) -> None:
    record = {"image": os.fsdecode(b"\xff.png"), "answer": None, "id": "1"}
    write(tmp_path / "a", (), [record])
    assert read_all(tmp_path / "a", ()) == [record]
    write(tmp_path / "b", COLUMNS, [record])
    assert read_all(tmp_path / "b", COLUMNS) == [{**record, "image": "\\udcff.png", "answer": ""}]


def test_long_csv_fields_are_read(tmp_path: Path) -> None:
    record = {"image": "a", "answer": "x" * 200_000, "id": "1"}
    write(tmp_path / "a", COLUMNS, [record])
    assert write(tmp_path / "a", COLUMNS, []) == [record]
