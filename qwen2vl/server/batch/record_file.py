"""A file of records, JSON lines or CSV, that only grows, and is resumed after any end of a process.

A record is appended by one write, so that a killed process leaves complete records and at most one
that is incomplete, which is cut off when the file is opened again. Records that were written stay:
`kill -9` loses none, and they are forced to disk every few seconds, for a power failure. A lock
refuses a second process.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen2vl.errors import InputError, Qwen2VLError

__all__ = ["RecordFile", "to_json_line"]

Record = dict[str, Any]


def to_json_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line of JSON; a file name that is not UTF-8 is escaped."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


class RecordFile:
    """Appends records to a file; as a context manager it is open, locked and recovered inside.

    Args:
        path: of the file; created if it does not exist.
        columns: of a CSV file, which begins with them; empty: JSON lines.
        flag: option that names the file, for errors.
        on_record: called with line number (or number of the row) and content of each record that
            the file has; a Qwen2VLError that it raises ends the opening, and changes nothing.
    """

    def __init__(
        self,
        path: Path,
        *,
        columns: Sequence[str] = (),
        flag: str = "-o",
        on_record: Callable[[int, Record], None] = lambda number, record: None,
    ) -> None:
        self.path = path
        self.columns = tuple(columns)
        self._where = f"{flag} {path}"
        self._on_record = on_record
        self._descriptor = -1
        self._size = 0  # of the complete records

    def __enter__(self) -> Self:
        """Open the file, read its records and cut off an incomplete one.

        Raises:
            InputError: it cannot be opened, is in use, or was written by something else.
        """
        self._open()
        try:
            self._recover()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # a disk that fails here has failed in `append` or `sync`, too
            os.fsync(self._descriptor)
        os.close(self._descriptor)

    def to_row(self, record: Mapping[str, Any]) -> bytes:
        """Return a record as the bytes that `append` takes; CSV has JSON for lists."""
        if not self.columns:
            return to_json_line(record)
        return _csv_row([_csv_value(record[name]) for name in self.columns])

    def append(self, row: bytes) -> None:
        """Write one record, whole or not at all.

        Raises:
            InputError: it cannot be written, such as on a full disk.
        """
        rest = memoryview(row)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise self._cannot_be_written(error) from error
        self._size += len(row)

    def sync(self) -> None:
        """Force what was written to disk; blocks.

        Raises:
            InputError: the disk fails.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._cannot_be_written(error) from error

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self._descriptor = os.open(self.path, flags, 0o666)
        except FileNotFoundError as error:
            folder = self.path.absolute().parent
            raise InputError(
                f"{self._where}: the folder {folder} does not exist; make it first"
            ) from error
        except OSError as error:
            raise self._cannot_be_written(error) from error
        try:
            self._check_and_lock()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _check_and_lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise InputError(f"{self._where}: is a pipe or a device; give a file")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{self._where}: another process writes this file; wait for its end, or give "
                "another file"
            ) from error
        except OSError:  # a file system without locks
            pass

    def _recover(self) -> None:
        rows = self._read_rows()
        first = 1  # line of the first record
        if self.columns:
            header = next(rows, None)
            first += header is not None
            if header is not None and header != _csv_row(self.columns):
                raise InputError(
                    f"{self._where}: its first line is not {','.join(self.columns)}: it was "
                    "written by something else, or with other options; give another file"
                )
        for number, row in enumerate(rows, first):
            self._on_record(number, self._parse(number, row))
        if self._size < os.fstat(self._descriptor).st_size:
            os.ftruncate(self._descriptor, self._size)
        if self.columns and first == 1:
            self.append(_csv_row(self.columns))

    def _read_rows(self) -> Iterator[bytes]:
        """Yield the complete rows, and count their bytes in `_size`."""
        with open(self._descriptor, "rb", closefd=False) as file:
            row = b""
            for line in file:
                row += line
                # Quotes within a CSV field are doubled: a row ends where their number is even.
                if row.endswith(b"\n") and not (self.columns and row.count(b'"') % 2):
                    self._size += len(row)
                    yield row
                    row = b""

    def _parse(self, number: int, row: bytes) -> Record:
        try:
            if not self.columns:
                record = json.loads(row)
            else:
                csv.field_size_limit(sys.maxsize)
                (values,) = csv.reader(io.StringIO(row.decode(), newline=""))
                record = dict(zip(self.columns, values, strict=True))
            if not isinstance(record, dict):
                raise ValueError
        except ValueError as error:  # of JSON, UTF-8 or the number of values
            raise InputError(
                f"{self._where}: line {number} was not written by this command; give another file"
            ) from error
        return record

    def _cannot_be_written(self, error: OSError) -> Qwen2VLError:
        return InputError(
            f"{self._where}: cannot be written: {error.strerror}; the same command continues once "
            "it can"
        )


def _csv_row(values: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _csv_value(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
