"""The file of answers: what may be one, and what earlier runs have left in it.

    each record -> `is_repeated` -> counted as done, or removed, so that it is answered again

Records are removed in one step, after all of them have been compared with what is asked for now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2vl.cli.batch.report import BatchReport
from qwen2vl.errors import InputError

if TYPE_CHECKING:
    from qwen2vl.files.record_file import RecordFile

__all__ = ["check_is_file", "open_answers"]

STDIN = "-"


def check_is_file(path: Path, flag: str) -> None:
    """Refuse `-`: both files of a batch are read again when it is resumed.

    Raises:
        InputError: the path is that of stdin or stdout.
    """
    if str(path) == STDIN:
        name, example = ("stdin", "requests") if flag == "-i" else ("stdout", "answers")
        raise InputError(
            f"{flag} -: a batch that is resumed reads its files again, and cannot read {name} "
            f"again; give a file, such as {example}.jsonl"
        )


def open_answers(
    stack: ExitStack,
    report: BatchReport,
    *,
    row_start: bytes,
    columns: Sequence[str] = (),
    is_repeated: Callable[[int, dict[str, Any]], bool],
    before_removal: Callable[[], None] = lambda: None,
) -> RecordFile:
    """Open the file of a report, count its answers, and remove those that are to be repeated.

    Args:
        stack: closes the file.
        report: of the run.
        row_start: as of RecordFile.
        columns: as of RecordFile.
        is_repeated: called with number and content of each record; raises what is wrong with it.
        before_removal: called if records are to be removed; raises why they are not.

    Raises:
        InputError: the file cannot be used; it stays as it is.
    """
    from qwen2vl.files.record_file import RecordFile

    repeated: set[int] = set()

    def on_record(number: int, record: dict[str, Any]) -> None:
        if is_repeated(number, record):
            repeated.add(number)
        else:
            report.count_done(record)

    file = stack.enter_context(
        RecordFile(report.output, row_start=row_start, columns=columns, on_record=on_record)
    )
    if repeated:
        before_removal()
        file.remove(repeated)
    return file
