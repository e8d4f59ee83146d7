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
from qwen2vl.files.record_file import RecordFile, to_json_line

START = b'{"i'
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
    with RecordFile(
        path, row_start=START, columns=columns, on_record=lambda _, one: found.append(one)
    ) as file:
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
        with RecordFile(
            path, row_start=START, columns=columns, on_record=lambda _, r, f=found: f.append(r)
        ) as file:
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


def test_zeros_before_later_records_are_cut_off_with_them(tmp_path: Path) -> None:
    path = tmp_path / "records"
    rows = [to_json_line({"id": str(number)}) for number in range(4)]
    path.write_bytes(rows[0] + rows[1][:3] + bytes(4096) + rows[2][3:] + rows[3])
    assert write(path, (), []) == [{"id": "0"}]
    assert path.read_bytes() == rows[0]
    path = tmp_path / "records.csv"
    write(path, COLUMNS, RECORDS)
    whole = path.read_bytes()
    start = whole.index(b"quoted")
    path.write_bytes(whole[:start] + bytes(20) + whole[start + 20 :])
    assert write(path, COLUMNS, RECORDS[1:]) == RECORDS[:1]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("columns", [(), COLUMNS], ids=["jsonl", "csv"])
def test_a_value_may_have_zeros(tmp_path: Path, columns: tuple[str, ...]) -> None:
    record = {"image": "a", "answer": "x\0y", "id": "1"}
    write(tmp_path / "a", columns, [record])
    shown = "x\ufffdy" if columns else "x\0y"
    assert write(tmp_path / "a", columns, []) == [{**record, "answer": shown}]


@pytest.mark.parametrize("columns", [(), COLUMNS], ids=["jsonl", "csv"])
@pytest.mark.parametrize(
    "content", [b'{"a": 1}', b"a,b,c", b"[", b"\n\0", bytes(9) + b"x", b"imagine", b"\x89PNG\0\0"]
)
def test_a_foreign_file_without_a_line_is_refused_and_kept(
    tmp_path: Path, columns: tuple[str, ...], content: bytes
) -> None:
    path = tmp_path / "records"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"was not written by this command|its first line is not"):
        write(path, columns, [])
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("columns", "content"),
    [
        *(((), one) for one in (b"", b"{", START, START + b'd": 1', bytes(9), START + bytes(9))),
        *((COLUMNS, one) for one in (b"", b"image,", b"image,answer,id", bytes(9))),
        (COLUMNS, b"image,answer,id\n"),
        (COLUMNS, b"image,answer,id\na.png"),
    ],
)
def test_what_a_killed_process_has_left_is_own(
    tmp_path: Path, columns: tuple[str, ...], content: bytes
) -> None:
    path = tmp_path / "records"
    path.write_bytes(content)
    assert write(path, columns, RECORDS[:1]) == []
    assert read_all(path, columns) == RECORDS[:1]


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    write(path, COLUMNS, RECORDS)
    with pytest.raises(InputError, match="its first line is not image,answer,boxes,id"):
        write(path, ("image", "answer", "boxes", "id"), [])


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records"
    with (
        RecordFile(path, row_start=START),
        pytest.raises(InputError, match="another process writes this file"),
    ):
        write(path, (), [])
    write(path, (), [])  # and not later


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder .* does not exist; make it first"):
        write(tmp_path / "none" / "records", (), [])
    with pytest.raises(InputError, match="is a folder; give a file"):
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
    with RecordFile(path, row_start=START) as file:
        monkeypatch.setattr(os, "write", write_some)
        with pytest.raises(InputError, match="No space left on device; the same command") as caught:
            file.append(to_json_line({"id": "2"}))
        assert isinstance(caught.value.__cause__, OSError)
        assert read_all(path, ()) == [{"id": "1"}]
        calls = 2
        file.append(to_json_line({"id": "3"}))  # in pieces of 5 bytes
    assert read_all(path, ()) == [{"id": "1"}, {"id": "3"}]


def test_a_disk_that_fails_is_reported_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    path = tmp_path / "records"

    def fail(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", real)  # the system reports it once
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def sync_twice() -> None:
        with RecordFile(path, row_start=START) as file:
            monkeypatch.setattr(os, "fsync", fail)
            with pytest.raises(InputError, match="cannot be written: Input/output error"):
                file.sync()

    def fail_otherwise() -> None:
        with RecordFile(path, row_start=START):
            monkeypatch.setattr(os, "fsync", fail)
            raise ZeroDivisionError

    with pytest.raises(InputError, match="Input/output error"), RecordFile(path, row_start=START):
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="Input/output error"):
        sync_twice()
    with pytest.raises(ZeroDivisionError):
        fail_otherwise()
    write(path, (), RECORDS)  # the lock is free


@pytest.mark.parametrize("columns", [(), COLUMNS], ids=["jsonl", "csv"])
def test_records_are_removed_at_once(tmp_path: Path, columns: tuple[str, ...]) -> None:
    path = tmp_path / "records"
    write(path, columns, RECORDS)
    path.chmod(0o640)
    numbers: list[int] = []

    def on_record(number: int, record: dict[str, Any]) -> None:
        if record["id"] in "24":
            numbers.append(number)

    with RecordFile(path, row_start=START, columns=columns, on_record=on_record) as file:
        file.remove(numbers)
        assert [one["id"] for one in read_all(path, columns)] == ["1", "3", "5"]
        with pytest.raises(InputError, match="another process writes this file"):
            write(path, columns, [])
        file.append(file.to_row(RECORDS[1]))
    assert [one["id"] for one in write(path, columns, [])] == ["1", "3", "5", "2"]
    assert [one.name for one in tmp_path.iterdir()] == ["records"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    path = tmp_path / "records"
    write(path, (), RECORDS)
    with RecordFile(path, row_start=START) as file:
        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(InputError, match="cannot be written: Permission denied"):
            file.remove([1])
        file.append(file.to_row(RECORDS[0]))
    assert [one["id"] for one in write(path, (), [])] == ["1", "2", "3", "4", "5", "1"]
    assert [one.name for one in tmp_path.iterdir()] == ["records"]


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
