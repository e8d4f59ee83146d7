"""Parquet source: rows with embedded image bytes, as in Hugging Face datasets.

A row is read with its whole row group, and the last row groups stay in memory: files with row
groups of about a hundred rows allow fast random access. Of many files only the last used are open.
The fingerprint is the hash of the footers, which have the sizes and offsets of all columns. pyarrow
(extra `data`) is imported only when a parquet file is opened.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from qwen2vl.data.formats import Sample, SampleError, parse_row
from qwen2vl.data.storage import Storage
from qwen2vl.errors import ConfigError, InputError

__all__ = ["ParquetSource"]

MAX_CACHED_GROUPS = 4  # row groups that each process keeps in memory
MAX_OPEN_FILES = 16  # files that each process keeps open


class ParquetSource:
    """Parquet files of rows with embedded media."""

    def __init__(self, paths: Sequence[str], storage: Storage, media_root: str) -> None:
        """Read the footers of all files.

        Raises:
            InputError: a file is missing, truncated, or not parquet.
            ConfigError: pyarrow is not installed.
        """
        self.paths, self.storage, self.media_root = list(paths), storage, media_root
        digest = blake2b(digest_size=16)
        self._file_of_group: list[int] = []  # of each row group: its file, and its index there
        self._index_in_file: list[int] = []
        num_rows: list[int] = []
        self._handles: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        for file_index, path in enumerate(self.paths):
            file = self._open(file_index)
            metadata = file.metadata
            file.close(force=True)  # pyarrow does not close a file object that it was given
            digest.update(_read_footer(self.storage, path, metadata.serialized_size))
            for index in range(metadata.num_row_groups):
                self._file_of_group.append(file_index)
                self._index_in_file.append(index)
                num_rows.append(metadata.row_group(index).num_rows)
        self._offsets = np.cumsum([0, *num_rows])
        self._digest = digest.hexdigest()
        if not len(self):
            raise InputError(
                f"{self.paths[0]} holds no row; write one conversation a row, in the columns that "
                "docs/training.md lists"
            )

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict(), "_groups": OrderedDict()}

    def fingerprint(self) -> str:
        """Return the hash of the footers."""
        return self._digest

    def name(self, index: int) -> str:
        """Return the name of a row: file and row number."""
        group, row = self._locate(index)
        first_row = (
            self._offsets[group]
            - self._offsets[self._file_of_group.index(self._file_of_group[group])]
        )
        return f"{self._file_name(group)}:{int(first_row) + row}"

    def read(self, index: int, *, pixels: bool = True) -> Sample:
        """Read one row."""
        group, row = self._locate(index)
        try:
            table = self._row_group(group)
            values = table.slice(row, 1).to_pylist()[0]
        except (OSError, ValueError) as error:  # base classes of pyarrow's errors
            raise SampleError(
                "text", f"the row group cannot be read: {_first_line(error)}"
            ) from error
        return parse_row(values, self.name(index))

    def _locate(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._offsets, index, side="right")) - 1
        return group, index - int(self._offsets[group])

    def _file_name(self, group: int) -> str:
        return self.paths[self._file_of_group[group]].rpartition("/")[2]

    def _row_group(self, group: int) -> Any:
        key = (os.getpid(), group)
        if key not in self._groups:
            file = self._open_file(self._file_of_group[group])
            self._groups[key] = file.read_row_group(self._index_in_file[group])
            while len(self._groups) > MAX_CACHED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _open_file(self, file_index: int) -> Any:
        """Return an open file; each process has its own, since workers must not share an offset."""
        key = (os.getpid(), file_index)
        if key not in self._handles:
            self._handles[key] = self._open(file_index)
            while len(self._handles) > MAX_OPEN_FILES:
                self._handles.popitem(last=False)[1].close(force=True)
        self._handles.move_to_end(key)
        return self._handles[key]

    def _open(self, file_index: int) -> Any:
        path = self.paths[file_index]
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


def _read_footer(storage: Storage, path: str, size: int) -> bytes:
    """Read a file's metadata: sizes, offsets and statistics of all columns."""
    with storage.open(path) as file:
        file.seek(-size - 8, os.SEEK_END)  # followed by its length and four magic bytes
        return file.read(size)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
