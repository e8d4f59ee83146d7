"""Columns of a row: which are used, which are refused, and which are reported as unused.

`datasets` gives all rows of a file the same columns and all objects the same keys, and fills what a
row lacks with null, pandas with NaN: such a key counts as absent, at every depth. A column that
belongs to another kind of training (preferences, audio) changes what the row means, so the
row is refused by the column's name; any other column that no format uses is counted, and reported
once for each source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isnan
from typing import Any

from qwen2vl.data.formats.samples import SampleError

__all__ = ["Row", "drop_nulls"]

_PREFERENCE = "is of preference data (DPO, ORPO, reward models), which is not trained here"
_REFUSED = {
    **dict.fromkeys(
        (
            "chosen",
            "rejected",
            "rejected_response",
            "rejected_messages",
            "rejected_images",
            "rejected_videos",
            "preferred_output",
            "non_preferred_output",
        ),
        _PREFERENCE,
    ),
    "completions": "is of stepwise supervision (PRM), which is not trained here",
    "negative_messages": "is of embedding training, which is not trained here",
    "audio": "has audio, for which the model has no encoder",
    "audios": "has audio, for which the model has no encoder",
    "chat_template_kwargs": "has options of another chat template",
}
_KTO_KEYS = ("label", "kto_tag")  # whether the answer is a good one; a label of no bool is unused
_NAME_KEYS = ("id",)  # named in messages about the sample
_MEDIA_NAME = re.compile(r"image|img|picture|photo|video|media", re.IGNORECASE)


class Row:
    """One row of a data file; records which of its columns are used."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Drop nulls, and check for columns that change what the row means.

        Raises:
            SampleError: it has such a column.
        """
        self._all_keys = raw.keys()
        self._columns: dict[str, Any] = drop_nulls(raw)
        self._used: set[str] = set(_NAME_KEYS)
        self._unused: dict[str, None] = {}  # a set in order
        self._notes: dict[str, None] = {}
        for key, value in self._columns.items():
            if key in _REFUSED and not _is_empty(value):
                raise SampleError("task", _refusal(key, _REFUSED[key]))
            if key in _KTO_KEYS and isinstance(value, bool):
                raise SampleError("task", _describe_kto(key, is_good=value))

    def has_column(self, *keys: str) -> bool:
        """Return whether the file gives this row one of these columns, be it null."""
        return not self._all_keys.isdisjoint(keys)

    def peek(self, key: str) -> Any:
        """Return a column, or None, without using it."""
        return self._columns.get(key)

    def take(self, key: str) -> Any:
        """Return a column, or None, and use it."""
        self._used.add(key)
        return self._columns.get(key)

    def add_unused(self, name: str) -> None:
        """Record a key inside a column, or a column that was taken, as unused."""
        self._unused[name] = None

    def add_note(self, note: str) -> None:
        """Record what the row has that is likely an error, for a count by note."""
        self._notes[note] = None

    def notes(self) -> tuple[str, ...]:
        """Return the recorded notes."""
        return tuple(self._notes)

    def find_media_name(self) -> str | None:
        """Return the first unused column whose name is that of a medium, as image_path."""
        return next((key for key in self.unused() if _MEDIA_NAME.search(key)), None)

    def unused(self) -> tuple[str, ...]:
        """Return the names of all columns and keys with a value that nothing was made of."""
        columns = (
            key
            for key, value in self._columns.items()
            if key not in self._used and not _is_empty(value)
        )
        return (*columns, *self._unused)

    def describe_keys(self) -> str:
        """Return the names of the columns that have a value, for errors."""
        return ", ".join(map(str, self._columns))


def drop_nulls(value: Any) -> Any:
    """Return JSON without the keys that are null or NaN, at every depth; in lists both are None."""
    if isinstance(value, dict):
        return {
            key: item if isinstance(item, str) else drop_nulls(item)
            for key, item in value.items()
            if item is not None and not (isinstance(item, float) and isnan(item))
        }
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return None if isinstance(value, float) and isnan(value) else value


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | Mapping | list) and not value)


def _describe_kto(key: str, *, is_good: bool) -> str:
    remedy = "remove the column to train on the answer" if is_good else "leave the row out"
    answer = "a good answer" if is_good else "an answer to avoid"
    return f"the column {key} marks {answer} (KTO), and answers are only learned here; {remedy}"


def _refusal(key: str, meaning: str) -> str:
    return f"the column {key} {meaning}; remove the column to train on the rest of the row"
