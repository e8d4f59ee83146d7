"""The results file of a suite: JSON lines, a header and one line for each answer.

    {"suite": "easy-vqa", "digest": "b960...", "blind": false, "model": {...}, "settings": {...}}
    {"id": "0000", "part": "shape_of_color", "question": "what is the red shape?", ...}

The header says what decides on the answers. A file with another one is refused and kept; one with
the same header is continued, also after `kill -9`. It has no dates and no paths, so that the same
run writes the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qwen2vl.errors import InputError
from qwen2vl.eval.task import ExampleResult
from qwen2vl.files.record_file import RecordFile, to_json_line

__all__ = ["ResultsFile", "ResultsHeader", "open_results", "read_results"]

ROW_START = b'{"suite": "'


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsHeader:
    """What decides on the answers of a run, beside the questions that were selected."""

    suite: str
    digest: str  # of the suite's items
    blind: bool
    model: Mapping[str, Any]
    settings: Mapping[str, Any]  # limit of tokens, greedy decoding, ...

    def to_dict(self) -> dict[str, Any]:
        """Return the header as plain JSON values."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ResultsHeader:
        """Read a header.

        Raises:
            ValueError: it is none.
        """
        names = [one.name for one in fields(cls)]
        if sorted(raw) != sorted(names) or not isinstance(raw["model"], dict):
            raise ValueError("not the header of a results file")
        return cls(**raw)


@dataclass(slots=True)
class ResultsFile:
    """The results of a file that is open, or of a run without one."""

    results: dict[str, ExampleResult] = field(default_factory=dict)  # by id
    _file: RecordFile | None = None

    def append(self, results: Sequence[ExampleResult]) -> None:
        """Add results, by one write.

        Raises:
            InputError: the file cannot be written.
        """
        if self._file is not None and results:
            self._file.append(b"".join(to_json_line(_to_row(result)) for result in results))
        self.results.update({result.name: result for result in results})

    def sync(self) -> None:
        """Force what was written to disk.

        Raises:
            InputError: the disk fails.
        """
        if self._file is not None:
            self._file.sync()


@contextmanager
def open_results(path: Path | None, header: ResultsHeader) -> Iterator[ResultsFile]:
    """Open a results file, which is created or continued; without a path nothing is written.

    Raises:
        InputError: the file cannot be written, is in use, or has the answers of another run.
    """
    opened = ResultsFile()
    if path is None:
        yield opened
        return
    has_header = False

    def on_record(number: int, record: dict[str, Any]) -> None:
        nonlocal has_header
        if number == 1:
            _check_header(path, record, header)
            has_header = True
        else:
            result = _from_row(path, number, record)
            opened.results[result.name] = result

    with RecordFile(path, row_start=ROW_START, on_record=on_record) as file:
        if not has_header:
            file.append(to_json_line(header.to_dict()))
        opened._file = file
        yield opened


def read_results(path: Path) -> tuple[ResultsHeader, dict[str, ExampleResult]]:
    """Read a results file, to compare it: its header, and its results by id.

    An incomplete last line, which a killed run leaves, is ignored.

    Raises:
        InputError: the file cannot be read, or is no results file.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    records = [_parse_line(path, number, line) for number, line in enumerate(lines, 1)]
    try:
        header = ResultsHeader.from_dict(records[0])
    except (ValueError, IndexError, TypeError) as error:
        raise InputError(
            f"{path}: is no results file; give one that `qwen2vl eval -o` has written"
        ) from error
    results = [_from_row(path, number, record) for number, record in enumerate(records[1:], 2)]
    return header, {result.name: result for result in results}


def _parse_line(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}: line {number} is no JSON; it is no results file") from error


def _check_header(path: Path, record: Mapping[str, Any], header: ResultsHeader) -> None:
    expected = _flatten(json.loads(to_json_line(header.to_dict())))
    found = _flatten(record)
    differences = [
        f"{name} {found.get(name)!s:.20} in place of {expected.get(name)!s:.20}"
        for name in dict.fromkeys((*expected, *found))
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise InputError(
            f"-o {path}: has the answers of another run: {', '.join(differences)}; give another "
            "file"
        )


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by names such as "model.name"."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _to_row(result: ExampleResult) -> dict[str, Any]:
    row = {one.name: getattr(result, one.name) for one in fields(result)}
    row = {"id": row.pop("name"), "part": row.pop("part"), **row}
    return {name: value for name, value in row.items() if value is not None}


def _from_row(path: Path, number: int, record: Any) -> ExampleResult:
    try:
        row = {"name": record["id"], **{k: v for k, v in record.items() if k != "id"}}
        return ExampleResult(**row)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: line {number} is no result of this version; give another file"
        ) from error
