"""Media of a row: the columns image, images, video and videos, and how text refers to them.

    <image> and <video> tags in text        LLaVA, ms-swift, LLaMA-Factory
    {"type": "image"}, without a source     TRL
    {"type": "image", "index": 0}           vision-language datasets on the Hugging Face Hub

Each medium is used once, in order, or by its index; what is left over, or lacks, is an error. Text
keeps its white space, as in a list of content items, but for LLaVA's line breaks between the tags
at the start or the end of a text and the rest of it: "<image>\\nWhat?" is the image and "What?".
Empty entries ("", null, {"bytes": null, "path": null}) are what files have for rows without media.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qwen2vl.data.formats.columns import Row
from qwen2vl.data.formats.samples import SampleError
from qwen2vl.errors import abbreviate

__all__ = ["MEDIA_COLUMNS", "MEDIA_TAG", "RowMedia", "media_item"]

MEDIA_TAG = re.compile(r"<(image|video)>")
MEDIA_COLUMNS = ("image", "images", "video", "videos")

_PLURAL_OF = {"image": "images", "video": "videos"}
_NO_COLUMN = "; give them in a column image, images, video or videos, or remove the tags"
_FIRST_TAGS = re.compile(r"(?:<(?:image|video)>\n?)+")
_LAST_TAGS = re.compile(r"(?:\n?<(?:image|video)>)+\Z")
# Placeholders that data have in place of <image>, which would be text here.
_FOREIGN_PLACEHOLDER = re.compile(
    r"<image_placeholder>|<ImageHere>|<\|(?:image|video)(?:_\d+|_pad)?\|>|<IMG_CONTEXT>"
    r"|<(?:image|video)[_ ]?\d+>|</(?:image|video)>|<(?:start_of_image|image_soft_token|im_patch)>"
)


class RowMedia:
    """The media of one row, each to be used once."""

    def __init__(self, row: Row) -> None:
        self.has_columns = row.has_column(*MEDIA_COLUMNS)
        self._row = row
        self._has_audio_columns = row.has_column("audio", "audios")
        self._items: dict[str, list[Mapping[str, Any]]] = {"image": [], "video": []}
        for kind, plural in _PLURAL_OF.items() if self.has_columns else ():
            for key in (kind, plural):
                given = row.take(key)
                for source in given if isinstance(given, list) else [given]:
                    item = media_item(source, kind)
                    if item is not None:
                        self._items[kind].append(item)
        self._num_used = {"image": 0, "video": 0}  # in order
        self._used_by_index: dict[str, set[int]] = {"image": set(), "video": set()}

    @property
    def is_given(self) -> bool:
        """Whether the row has an image or a video."""
        return any(self._items.values())

    def next_item(self, kind: str) -> Mapping[str, Any]:
        """Use the next medium of a kind; too many of them are found by `check_all_used`."""
        self._num_used[kind] += 1
        items = self._items[kind]
        return items[self._num_used[kind] - 1] if self._num_used[kind] <= len(items) else {}

    def item_at(self, kind: str, index: Any) -> Mapping[str, Any]:
        """Use the medium at an index of its column.

        Raises:
            SampleError: there is none.
        """
        items = self._items[kind]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(items):
            raise SampleError(
                "placeholders",
                f"the index of an item of type {kind} is {abbreviate(index)}, and the row has "
                f"{len(items)} {_PLURAL_OF[kind]}; indices begin at 0",
            )
        self._used_by_index[kind].add(index)
        return items[index]

    def take_remaining(self) -> list[Mapping[str, Any]]:
        """Use the media that nothing has referred to, for formats without tags."""
        remaining = []
        for kind, items in self._items.items():
            remaining += items[self._num_used[kind] :]
            self._num_used[kind] = len(items)
        return remaining

    def split(self, text: str) -> Iterator[str | Mapping[str, Any]]:
        """Split text at its tags, using media."""
        if first := _FIRST_TAGS.match(text):
            text = _drop_line_breaks(first) + text[first.end() :]
        if text.endswith(("<image>", "<video>")):
            text = _LAST_TAGS.sub(_drop_line_breaks, text)
        for i, segment in enumerate(MEDIA_TAG.split(text)):
            if i % 2:
                yield self.next_item(segment)
            elif segment:
                yield segment

    def check_text(self, text: str) -> None:
        """Check that text has no placeholder that would be read, or taught, as text.

        Raises:
            SampleError: it has one.
        """
        if "<" not in text:
            return
        if not self.has_columns:
            self._check_column_names(text)
        elif found := _FOREIGN_PLACEHOLDER.search(text):
            raise SampleError(
                "placeholders",
                f"the text has the placeholder {found[0]}, which would be read as text; write "
                "<image> or <video> where the medium is",
            )
        if self._has_audio_columns and "<audio>" in text:
            raise SampleError(
                "placeholders",
                "the text has <audio>, and the model has no encoder for audio; leave the row out",
            )

    def _check_column_names(self, text: str) -> None:
        """Refuse a tag beside a column that has its medium under another name."""
        found, column = MEDIA_TAG.search(text), self._row.find_media_name()
        if found and column:
            raise SampleError(
                "placeholders",
                f"the text has {found[0]}, and the row has no {_PLURAL_OF[found[1]]}; if the "
                f"column {column} has them, rename it, else remove it",
            )

    def check_all_used(self, hint: str = "") -> None:
        """Check that every medium of the row was used, and that none was missing.

        Args:
            hint: appended to the error about their numbers.

        Raises:
            SampleError: tags or items and media do not match.
        """
        remedy = "" if self.has_columns else _NO_COLUMN
        for kind, items in self._items.items():
            in_order, by_index = self._num_used[kind], self._used_by_index[kind]
            if in_order and by_index:
                raise SampleError(
                    "placeholders",
                    f"some {_PLURAL_OF[kind]} are given by their index and some in order; use one",
                )
            if in_order and not items and self.has_columns:
                raise SampleError(
                    "missing",
                    f"{in_order} <{kind}> in the text, and the row's {_PLURAL_OF[kind]} are empty",
                )
            if in_order + len(by_index) != len(items):
                raise SampleError(
                    "placeholders",
                    f"{in_order + len(by_index)} <{kind}> tags for {len(items)} "
                    f"{_PLURAL_OF[kind]}; each needs one{hint}{remedy}",
                )


def _drop_line_breaks(found: re.Match[str]) -> str:
    return found[0].replace("\n", "")


def media_item(source: Any, kind: str) -> Mapping[str, Any] | None:
    """Return a medium of a row as a content item; None if the entry is empty.

    Args:
        source: a path, bytes, frames, parquet's {"bytes", "path"}, or an item with options.
        kind: "image" or "video".

    Raises:
        SampleError: the item is of another kind.
    """
    options: Mapping[str, Any] = {}
    if isinstance(source, Mapping) and ("bytes" in source or source.keys() == {"path"}):
        options = {key: source[key] for key in source if key not in ("type", "bytes", "path")}
        source = source.get("bytes") or source.get("path")
    if source is None or (isinstance(source, str | bytes | Mapping | list) and not source):
        return None
    if not isinstance(source, Mapping):
        return {**options, "type": kind, kind: source}
    if source.get("type", kind) not in (kind, f"{kind}_url", f"input_{kind}"):
        raise SampleError(
            "messages", f"an entry of {_PLURAL_OF[kind]} has the type {abbreviate(source['type'])}"
        )
    return {**source, "type": kind}
