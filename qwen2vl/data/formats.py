"""Data formats: parses one row of a data file into a sample, in any of the supported layouts.

    {"messages": [{"role": "user", "content": ...}, ...]}                OpenAI, Qwen, HF chat
    {"conversations": [{"from": "human", "value": "<image>..."}, ...]}   ShareGPT, LLaVA
    {"texts": [{"user": ..., "assistant": ...}, ...]}                    The Cauldron, FineVision
    {"texts": ["A cat.", null], "images": [null, "b.png"]}               OBELICS: interleaved
    {"text": "A cat on a mat.", "image": "a.png"}                        pairs, documents, text

Media are in `image`, `images`, `video` or `videos`, one for each <image> or <video> tag. Other keys
of a row are ignored. Media are not opened and text is not tokenized here (preprocess.py does that).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen2vl.errors import InputError

__all__ = [
    "Conversation",
    "Document",
    "Sample",
    "SampleError",
    "TextTokens",
    "describe_reasons",
    "parse_row",
]

# Reason that bad samples are counted by -> what is wrong with them, for people.
_DESCRIPTIONS = {
    "answer": "without an answer to learn from",
    "image": "with an unreadable image",
    "length": "with media changed since they were measured",
    "messages": "with malformed messages",
    "missing": "with a missing media file",
    "oversize": "larger than a bin",
    "placeholders": "whose <image> or <video> tags do not match their media",
    "text": "with unreadable text",
    "video": "with an unreadable video",
}

_TAG = re.compile(r"<(image|video)>")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_MEDIA_NAMES = {"image": "images", "video": "videos"}


class SampleError(InputError):
    """One sample cannot be used; `reason` is the category it is counted by."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def describe_reasons(counts: Mapping[str, int]) -> str:
    """Say how many samples are bad for which reason, most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count:,} {_DESCRIPTIONS[reason]}" for reason, count in ordered)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of a chat; the assistant's turns are supervised."""

    id: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """Interleaved text and media; all text is supervised."""

    id: str
    parts: tuple[str | Mapping[str, Any], ...]  # text, or the content item of an image or video


@dataclass(frozen=True, slots=True)
class TextTokens:
    """Text that is already tokenized; all tokens are supervised."""

    id: str
    ids: np.ndarray


Sample = Conversation | Document | TextTokens


def parse_row(row: Any, name: str) -> Conversation | Document:
    """Parse one row; `name` identifies the sample, with the row's own id appended if it has one.

    Raises:
        SampleError: unknown format, unknown role, or tags and media that do not match.
    """
    if not isinstance(row, Mapping):
        raise SampleError("messages", f"the row is a {type(row).__name__}, not an object")
    row_id = row.get("id")
    name = f"{name} ({row_id})" if isinstance(row_id, str | int) and row_id != "" else name
    if _is_interleaved(row):
        return Document(name, tuple(_interleaved_parts(row)))
    media = _RowMedia(row)
    for key, parse in (
        ("messages", _parse_messages),
        ("conversations", _parse_sharegpt),
        ("texts", _parse_qa_pairs),
    ):
        if row.get(key) is not None:
            messages = parse(row[key], media, row)
            media.check_all_used()
            return Conversation(name, messages, _parse_tools(row.get("tools")))
    text = row.get("text", row.get("caption"))
    if isinstance(text, str):
        # Without a tag, the media precede the text that describes them.
        leading = media.take_remaining() if not _TAG.search(text) else []
        document = Document(name, (*leading, *media.split(text, tagged=media.given)))
        media.check_all_used()
        return document
    keys = ", ".join(map(str, row))
    raise SampleError(
        "messages",
        f"the row has the keys {keys}, and none of messages, conversations, texts or text"
        if keys
        else "the row is empty",
    )


class _RowMedia:
    """The media of one row, consumed tag by tag."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._items = {kind: list(_media_items(row, kind)) for kind in _MEDIA_NAMES}
        self._num_used = dict.fromkeys(_MEDIA_NAMES, 0)
        self.given = any(self._items.values())

    def split(self, text: str, *, tagged: bool = True) -> Iterator[str | Mapping[str, Any]]:
        """Split text at its tags; whitespace around a tag is dropped."""
        if not tagged:
            yield text
            return
        for i, segment in enumerate(_TAG.split(text)):
            if i % 2:
                yield self._next_item(segment)
            elif segment.strip():
                yield segment.strip()

    def content(self, text: Any, *, tagged: bool = True) -> Any:
        """Return a message's text as content items, if it has tags."""
        if not isinstance(text, str) or not tagged or not _TAG.search(text):
            return text
        return [
            {"type": "text", "text": part} if isinstance(part, str) else part
            for part in self.split(text)
        ]

    def take_remaining(self) -> list[Mapping[str, Any]]:
        """Return the media that no tag has consumed, for formats without tags."""
        remaining = []
        for kind, items in self._items.items():
            remaining += items[self._num_used[kind] :]
            self._num_used[kind] = len(items)
        return remaining

    def check_all_used(self) -> None:
        for kind, items in self._items.items():
            if self._num_used[kind] != len(items):
                raise SampleError(
                    "placeholders",
                    f"{self._num_used[kind]} <{kind}> tags for {len(items)} "
                    f"{_MEDIA_NAMES[kind]}; each needs one",
                )

    def _next_item(self, kind: str) -> Mapping[str, Any]:
        self._num_used[kind] += 1
        items = self._items[kind]
        return items[self._num_used[kind] - 1] if self._num_used[kind] <= len(items) else {}


def _media_items(row: Mapping[str, Any], kind: str) -> Iterator[Mapping[str, Any]]:
    """List the row's media of one kind as content items."""
    for key in (kind, f"{kind}s"):
        given = row.get(key)
        for source in given if isinstance(given, list | tuple) else [given]:
            if source is not None:
                yield _media_item(source, kind)


def _media_item(source: Any, kind: str) -> Mapping[str, Any]:
    """Accept a path, bytes, frames, parquet's {"bytes", "path"}, or an item with options."""
    if not isinstance(source, Mapping):
        return {"type": kind, kind: source}
    if "bytes" in source:
        data = source["bytes"]
        return {"type": kind, kind: data if data is not None else source.get("path")}
    return {"type": kind, **source}


def _parse_messages(
    value: Any, media: _RowMedia, _row: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    parsed = []
    for message in _require_list(value, "messages"):
        if not isinstance(message, Mapping):
            raise SampleError("messages", f"a message is {message!r:.40}, not an object")
        content = media.content(message.get("content"), tagged=media.given)
        parsed.append({**message, "content": content})
    return parsed


def _parse_sharegpt(
    value: Any, media: _RowMedia, row: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    parsed: list[Mapping[str, Any]] = []
    if isinstance(row.get("system"), str) and row["system"]:
        parsed.append({"role": "system", "content": row["system"]})
    for i, turn in enumerate(_require_list(value, "conversations")):
        if not isinstance(turn, Mapping):
            raise SampleError("messages", f"conversations[{i}] is {turn!r:.40}, not an object")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in _ROLES:
            raise SampleError(
                "messages",
                f"conversations[{i}] is from {role!r:.40}; known are {', '.join(sorted(_ROLES))}",
            )
        text = turn.get("value", turn.get("content"))
        parsed.append({"role": _ROLES[role], "content": media.content(text)})
    return parsed


def _parse_qa_pairs(
    value: Any, media: _RowMedia, _row: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    parsed: list[Mapping[str, Any]] = []
    for i, pair in enumerate(_require_list(value, "texts")):
        if not isinstance(pair, Mapping) or {"user", "assistant"} - pair.keys():
            raise SampleError("messages", f"texts[{i}] must have user and assistant")
        media_items = media.take_remaining()  # media precede the first question
        content = (
            [*media_items, {"type": "text", "text": pair["user"]}] if media_items else pair["user"]
        )
        parsed.append({"role": "user", "content": content})
        parsed.append({"role": "assistant", "content": pair["assistant"]})
    return parsed


def _is_interleaved(row: Mapping[str, Any]) -> bool:
    """Return whether texts and images are parallel lists, one of the two null at each index."""
    texts = row.get("texts")
    return isinstance(texts, list) and any(isinstance(text, str) for text in texts)


def _interleaved_parts(row: Mapping[str, Any]) -> Iterator[str | Mapping[str, Any]]:
    """Yield the parts of an interleaved document in order: at each index a text or an image."""
    texts, images = row["texts"], row.get("images") or [None] * len(row["texts"])
    if not isinstance(images, list) or len(images) != len(texts):
        raise SampleError(
            "placeholders",
            f"{len(texts)} texts beside {len(images)} images; each index needs one of both",
        )
    for text, image in zip(texts, images, strict=True):
        if image is not None:
            yield _media_item(image, "image")
        if isinstance(text, str) and text.strip():
            yield text


def _parse_tools(value: Any) -> Any:
    """Parse the tool definitions, which some files store as a JSON string."""
    try:
        parsed = json.loads(value.strip() or "null") if isinstance(value, str) else value
    except ValueError as error:
        raise SampleError("messages", f"tools is not JSON: {error}") from error
    if not parsed:
        return None
    if not isinstance(parsed, list | tuple) or not all(
        isinstance(tool, Mapping) for tool in parsed
    ):
        raise SampleError("messages", f"tools is {parsed!r:.40}; it must be a list of objects")
    return parsed


def _require_list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise SampleError("messages", f"{key} is {value!r:.40}; it must be a list with turns")
    return list(value)
