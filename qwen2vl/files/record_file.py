"""A file of records, JSON lines or CSV, that only grows, and is resumed after any end of a process.

A record is appended by one write, so that a killed process leaves complete records and at most one
that is incomplete, which is cut off when the file is opened again. Records that were written stay:
`kill -9` loses none, and they are forced to disk every few seconds, for a power failure, after
which a file may have zeros in place of its last blocks: no record has them, and a file is cut at
the first one that does. A lock refuses a second process.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen2vl.errors import InputError, Qwen2VLError

__all__ = ["RecordFile", "to_json_line"]

Record = dict[str, Any]
READ_CHUNK = 1 << 20
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK


def to_json_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line of JSON; a file name that is not UTF-8 is escaped."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


class RecordFile:
    """Appends records to a file; as a context manager it is open, locked and recovered inside.

    Args:
        path: of the file; created if it does not exist.
        row_start: with what every record begins, if it is JSON; a file without a complete record
            that begins otherwise is another program's, and is kept.
        columns: of a CSV file, which begins with them; empty: JSON lines.
        flag: option that names the file, for errors.
        on_record: called with line number (or number of the row) and content of each record that
            the file has; a Qwen2VLError that it raises ends the opening, and changes nothing.
    """

    def __init__(
        self,
        path: Path,
        *,
        row_start: bytes,
        columns: Sequence[str] = (),
        flag: str = "-o",
        on_record: Callable[[int, Record], None] = lambda number, record: None,
    ) -> None:
        self.path = path
        self.columns = tuple(columns)
        self._file_start = _csv_row(columns) if columns else row_start
        self._where = f"{flag} {path}"
        self._on_record = on_record
        self._descriptor = -1
        self._size = 0  # of the complete records
        self._sync_error: OSError | None = None

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
        try:
            self.sync()
        except InputError:
            if error is None:  # else it is the error that counts
                raise
        finally:
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
            InputError: the disk fails, or has failed before.
        """
        if self._sync_error is None:  # the system reports a failure once, and forgets it
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self._sync_error = error
        if self._sync_error is not None:
            raise self._cannot_be_written(self._sync_error) from self._sync_error

    def remove(self, numbers: Container[int]) -> None:
        """Remove records: a new file without them takes the place of the old one, at once.

        Args:
            numbers: of the records, as `on_record` had them.

        Raises:
            InputError: the new file cannot be written; the old one stays.
        """
        path = self.path.resolve()  # a link stays one
        new_path = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            descriptor = os.open(new_path, _FLAGS | os.O_EXCL, 0o600)
        except OSError as error:
            raise self._cannot_be_written(error) from error
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            size = self._copy_rows(descriptor, numbers)
            os.fchmod(descriptor, stat.S_IMODE(os.fstat(self._descriptor).st_mode))
            os.fsync(descriptor)
            os.replace(new_path, path)
        except OSError as error:
            os.close(descriptor)
            new_path.unlink(missing_ok=True)
            raise self._cannot_be_written(error) from error
        os.close(self._descriptor)
        self._descriptor, self._size = descriptor, size
        self._sync_folder()

    def _copy_rows(self, descriptor: int, numbers: Container[int]) -> int:
        """Write the rows but those of `numbers` into a file, and return their size."""
        size = 0
        with open(descriptor, "wb", closefd=False) as new:
            for number, row in enumerate(self._read_rows(), 1):
                if number not in numbers:
                    size += new.write(row)
        return size

    def _open(self) -> None:
        try:
            self._descriptor = os.open(self.path, _FLAGS, 0o666)
        except FileNotFoundError as error:
            folder = self.path.absolute().parent
            raise InputError(
                f"{self._where}: the folder {folder} does not exist; make it first"
            ) from error
        except IsADirectoryError as error:
            raise InputError(f"{self._where}: is a folder; give a file") from error
        except OSError as error:
            raise self._cannot_be_written(error) from error
        try:
            self._check_and_lock()
            self._sync_folder()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _check_and_lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise InputError(f"{self._where}: is a pipe or a device; give a file")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._in_use() from error
        except OSError:  # a file system without locks
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                return
        raise self._in_use()  # a process has replaced the file between opening and locking

    def _in_use(self) -> InputError:
        return InputError(
            f"{self._where}: another process writes this file; wait for its end, or give "
            "another file"
        )

    def _sync_folder(self) -> None:
        """Force the file's name to disk."""
        with suppress(OSError):  # a folder that cannot be read, or a file system without it
            folder = os.open(self.path.resolve().parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _recover(self) -> None:
        first = 1  # line of the first record
        for number, row in enumerate(self._read_rows(), 1):
            if self.columns and number == 1:
                if row != self._file_start:
                    raise InputError(
                        f"{self._where}: its first line is not {','.join(self.columns)}: it was "
                        "written by something else, or with other options; give another file"
                    )
                first = 2
            else:
                self._on_record(number, self._parse(number, row))
            self._size += len(row)
        if self._size == 0:
            self._check_own()
        if self._size < os.fstat(self._descriptor).st_size:
            os.ftruncate(self._descriptor, self._size)
        if self.columns and first == 1:
            self.append(self._file_start)

    def _read_rows(self) -> Iterator[bytes]:
        """Yield the complete rows, up to one with zeros."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        with open(self._descriptor, "rb", closefd=False) as file:
            row = b""
            for line in file:
                if b"\0" in line:
                    return
                row += line
                # Quotes within a CSV field are doubled: a row ends where their number is even.
                if row.endswith(b"\n") and not (self.columns and row.count(b'"') % 2):
                    yield row
                    row = b""

    def _check_own(self) -> None:
        """Check that a file without a complete record is what this command has left of one."""
        head = os.pread(self._descriptor, len(self._file_start), 0)
        if not self._file_start.startswith(head) and not self._has_only_zeros():
            raise InputError(
                f"{self._where}: was not written by this command; give another file, or remove it"
            )

    def _has_only_zeros(self) -> bool:
        offset = 0
        while chunk := os.pread(self._descriptor, READ_CHUNK, offset):
            if chunk.count(0) < len(chunk):
                return False
            offset += len(chunk)
        return True

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
    """Return a row; zeros, which a JSON line escapes, become U+FFFD."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().replace("\0", "\ufffd").encode("utf-8", "backslashreplace")


def _csv_value(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
