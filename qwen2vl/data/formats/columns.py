"""Columns of a row: which are used, which are refused, and which are reported as unused.

`datasets` gives all rows of a file the same columns and all objects the same keys, and fills what a
row lacks with null: a key whose value is null counts as absent, at every depth. A column that
belongs to another kind of training (preferences, rewards, audio) changes what the row means, so the
row is refused by the column's name; any other column that no format uses is counted, and reported
once for each source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen2vl.data.formats.samples import SampleError

__all__ = ["Row", "drop_nulls"]

_PREFERENCE = "is of preference data (DPO, ORPO, KTO, reward models)"
_REFUSED = {
    **dict.fromkeys(
        (
            "chosen",
            "rejected",
            "rejected_response",
            "rejected_messages",
            "rejected_images",
            "rejected_videos",
            "kto_tag",
        ),
        _PREFERENCE,
    ),
    "completions": "is of stepwise supervision (PRM)",
    "negative_messages": "is of embedding training",
    "audio": "is a sound, which the model cannot hear",
    "audios": "is a sound, which the model cannot hear",
    "chat_template_kwargs": "has options of another chat template",
}
_NAME_KEYS = ("id",)  # named in messages about the sample


class Row:
    """One row of a data file; records which of its columns are used."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Drop nulls, and check for columns that change what the row means.

        Raises:
            SampleError: it has such a column.
        """
        self._all_keys = frozenset(raw)
        self._columns: dict[str, Any] = drop_nulls(raw)
        self._used: set[str] = set(_NAME_KEYS)
        self._unused: dict[str, None] = {}  # a set in order
        for key, meaning in _REFUSED.items():
            if not _is_empty(self._columns.get(key)):
                raise SampleError("task", _refusal(key, meaning))
        if isinstance(self._columns.get("label"), bool):  # any other label is of no trainer here
            raise SampleError("task", _refusal("label", _PREFERENCE))

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
    """Return a value without the keys that are null, at every depth; null in a list stays."""
    if isinstance(value, Mapping):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [drop_nulls(item) for item in value]
    return value


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | Mapping | list) and not value)


def _refusal(key: str, meaning: str) -> str:
    return (
        f"the column {key} {meaning}, which is not trained here; remove the column to train on the "
        "rest of the row"
    )
