"""Rows of parquet files, with the bytes of their pictures inside, as Hugging Face writes them.

A row is read with its whole row group, and the last groups stay in memory: files with groups of a
hundred rows are read at random for little. Of many files only the last used are open. A file is
named by its footer, which holds the sizes and places of all it contains. pyarrow comes only when a
parquet file does (extra `data`). It must not know dialects. Next rooms: sources.py, dialects.py.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from qwen2vl.data.formats import Sample, SampleError, read_row
from qwen2vl.data.storage import Storage
from qwen2vl.errors import ConfigError, InputError

__all__ = ["Parquet"]

GROUPS = 4  # row groups that each process keeps
HANDLES = 16  # files that each process keeps open


class Parquet:
    """Files of rows with embedded media."""

    def __init__(self, paths: Sequence[str], storage: Storage, base: str) -> None:
        """Read the footers.

        Raises:
            InputError: a file is missing, cut short, or no parquet.
            ConfigError: pyarrow is not installed.
        """
        self.paths, self.storage, self.base = list(paths), storage, base
        footer = blake2b(digest_size=16)
        self._files: list[int] = []  # of each row group: its file, and its number there
        self._numbers: list[int] = []
        rows: list[int] = []
        self._handles: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        for i, path in enumerate(self.paths):
            file = self._open(i)
            about = file.metadata
            file.close(force=True)  # pyarrow leaves a file open that it did not open itself
            footer.update(_footer(self.storage, path, about.serialized_size))
            for number in range(about.num_row_groups):
                self._files.append(i)
                self._numbers.append(number)
                rows.append(about.row_group(number).num_rows)
        self._first = np.cumsum([0, *rows])
        self._digest = footer.hexdigest()
        if not len(self):
            raise InputError(f"{self.paths[0]} holds no row")

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict(), "_groups": OrderedDict()}

    def fingerprint(self) -> str:
        """Name the content by the footers."""
        return self._digest

    def name(self, index: int) -> str:
        """Say where a row stands."""
        group, row = self._place(index)
        before = self._first[group] - self._first[self._files.index(self._files[group])]
        return f"{self._label(group)}:{int(before) + row}"

    def read(self, index: int, *, pixels: bool = True) -> Sample:
        """Read one row."""
        group, row = self._place(index)
        try:
            table = self._group(group)
            found = table.slice(row, 1).to_pylist()[0]
        except (OSError, ValueError) as error:  # pyarrow's errors are these
            raise SampleError(
                "text", f"the row group cannot be read: {_first_line(error)}"
            ) from error
        return read_row(found, self.name(index))

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._first, index, side="right")) - 1
        return group, index - int(self._first[group])

    def _label(self, group: int) -> str:
        return self.paths[self._files[group]].rpartition("/")[2]

    def _group(self, group: int) -> Any:
        key = (os.getpid(), group)
        if key not in self._groups:
            file = self._handle(self._files[group])
            self._groups[key] = file.read_row_group(self._numbers[group])
            while len(self._groups) > GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _handle(self, number: int) -> Any:
        """Keep a file open, in each process its own: workers must not share a place in it."""
        key = (os.getpid(), number)
        if key not in self._handles:
            self._handles[key] = self._open(number)
            while len(self._handles) > HANDLES:
                self._handles.popitem(last=False)[1].close(force=True)
        self._handles.move_to_end(key)
        return self._handles[key]

    def _open(self, number: int) -> Any:
        path = self.paths[number]
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ConfigError(
                f"{path}: parquet needs the package pyarrow; pip install 'qwen2vl[data]'"
            ) from error
        try:
            return ParquetFile(self.storage.open(path))
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file; check the path") from error
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as parquet: {_first_line(error)}; is it cut short?"
            ) from error


def _footer(storage: Storage, path: str, size: int) -> bytes:
    """Read what a file says about itself: sizes, places and extremes of all columns."""
    with storage.open(path) as file:
        file.seek(-size - 8, os.SEEK_END)  # its length and four letters come after it
        return file.read(size)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
