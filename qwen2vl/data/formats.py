"""One row of a data file -> one sample, whichever of the known dialects it is written in.

    {"messages": [{"role": "user", "content": ...}, ...]}                OpenAI's, Qwen's, HF's
    {"conversations": [{"from": "human", "value": "<image>..."}, ...]}   ShareGPT, LLaVA
    {"texts": [{"user": ..., "assistant": ...}, ...]}                    The Cauldron, FineVision
    {"texts": ["A cat.", null], "images": [null, "b.png"]}               OBELICS: an article
    {"text": "A cat on a mat.", "image": "a.png"}                        pairs, pages, plain text

Media stand in `image`, `images`, `video` or `videos`, one for each tag. Whatever else a row holds
is none of our business. It must not open media or know tokens. Next room: prepare.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen2vl.errors import InputError

__all__ = ["Conversation", "Page", "Sample", "SampleError", "Words", "read_row"]

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
_NAMES = {"image": "pictures", "video": "videos"}


class SampleError(InputError):
    """One sample cannot be used; `reason` is the word it is counted by."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, of which the assistant's are learned."""

    id: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Words and media as they follow each other, of which all words are learned."""

    id: str
    parts: tuple[str | Mapping[str, Any], ...]  # text, or a content item of a medium


@dataclass(frozen=True, slots=True)
class Words:
    """Text that was tokenized before, of which all is learned."""

    id: str
    ids: np.ndarray


Sample = Conversation | Page | Words


def read_row(row: Any, name: str) -> Conversation | Page:
    """Read one row; `name` is used where the row has no id of its own.

    Raises:
        SampleError: no known dialect, a turn of nobody, or tags and media that do not match.
    """
    if not isinstance(row, Mapping):
        raise SampleError("messages", f"the row is a {type(row).__name__}, not an object")
    own = row.get("id")
    name = f"{name} ({own})" if isinstance(own, str | int) and own != "" else name
    if _is_article(row):
        return Page(name, tuple(_article(row)))
    media = _Media(row)
    for key, read in (("messages", _messages), ("conversations", _turns), ("texts", _pairs)):
        if row.get(key) is not None:
            messages = read(row[key], media, row)
            media.check_used()
            return Conversation(name, messages, _tools(row.get("tools")))
    text = row.get("text", row.get("caption"))
    if isinstance(text, str):
        # Without a tag the words are about what stands before them.
        before = media.unplaced() if not _TAG.search(text) else []
        page = Page(name, (*before, *media.split(text, tagged=media.given)))
        media.check_used()
        return page
    keys = ", ".join(map(str, row))
    raise SampleError("messages", f"none of messages, conversations, texts or text in {keys}")


class _Media:
    """The media of one row, handed out tag by tag."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._all = {kind: list(_listed(row, kind)) for kind in _NAMES}
        self._tags = dict.fromkeys(_NAMES, 0)
        self.given = any(self._all.values())

    def split(self, text: str, *, tagged: bool = True) -> Iterator[str | Mapping[str, Any]]:
        """Cut text at its tags; space around a tag is the tag's own."""
        if not tagged:
            yield text
            return
        for i, piece in enumerate(_TAG.split(text)):
            if i % 2:
                yield self._next(piece)
            elif piece.strip():
                yield piece.strip()

    def content(self, text: Any, *, tagged: bool = True) -> Any:
        """Turn a turn's text into content items, where it has tags."""
        if not isinstance(text, str) or not tagged or not _TAG.search(text):
            return text
        return [
            {"type": "text", "text": part} if isinstance(part, str) else part
            for part in self.split(text)
        ]

    def unplaced(self) -> list[Mapping[str, Any]]:
        """Hand out what is left, for dialects without tags."""
        found = []
        for kind, items in self._all.items():
            found += items[self._tags[kind] :]
            self._tags[kind] = len(items)
        return found

    def check_used(self) -> None:
        for kind, items in self._all.items():
            if self._tags[kind] != len(items):
                raise SampleError(
                    "placeholders",
                    f"{self._tags[kind]} <{kind}> tags for {len(items)} {_NAMES[kind]}; each needs "
                    "one",
                )

    def _next(self, kind: str) -> Mapping[str, Any]:
        self._tags[kind] += 1
        items = self._all[kind]
        return items[self._tags[kind] - 1] if self._tags[kind] <= len(items) else {}


def _listed(row: Mapping[str, Any], kind: str) -> Iterator[Mapping[str, Any]]:
    """List the row's media of one kind as content items."""
    for key in (kind, f"{kind}s"):
        given = row.get(key)
        for source in given if isinstance(given, list | tuple) else [given]:
            if source is not None:
                yield _item(source, kind)


def _item(source: Any, kind: str) -> Mapping[str, Any]:
    """Read a name, bytes, frames, parquet's {"bytes", "path"}, or an item with options."""
    if not isinstance(source, Mapping):
        return {"type": kind, kind: source}
    if "bytes" in source:
        held = source["bytes"]
        return {"type": kind, kind: held if held is not None else source.get("path")}
    return {"type": kind, **source}


def _messages(given: Any, media: _Media, _row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = []
    for message in _a_list(given, "messages"):
        if not isinstance(message, Mapping):
            raise SampleError("messages", f"a message is {message!r:.40}, not an object")
        content = media.content(message.get("content"), tagged=media.given)
        found.append({**message, "content": content})
    return found


def _turns(given: Any, media: _Media, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    if isinstance(row.get("system"), str) and row["system"]:
        found.append({"role": "system", "content": row["system"]})
    for i, turn in enumerate(_a_list(given, "conversations")):
        if not isinstance(turn, Mapping):
            raise SampleError("messages", f"conversations[{i}] is {turn!r:.40}, not an object")
        who = turn.get("from", turn.get("role"))
        if not isinstance(who, str) or who not in _ROLES:
            raise SampleError(
                "messages",
                f"conversations[{i}] is from {who!r:.40}; known are {', '.join(sorted(_ROLES))}",
            )
        text = turn.get("value", turn.get("content"))
        found.append({"role": _ROLES[who], "content": media.content(text)})
    return found


def _pairs(given: Any, media: _Media, _row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for i, pair in enumerate(_a_list(given, "texts")):
        if not isinstance(pair, Mapping) or {"user", "assistant"} - pair.keys():
            raise SampleError("messages", f"texts[{i}] must have user and assistant")
        first = media.unplaced()  # pictures stand before the first question
        content = [*first, {"type": "text", "text": pair["user"]}] if first else pair["user"]
        found.append({"role": "user", "content": content})
        found.append({"role": "assistant", "content": pair["assistant"]})
    return found


def _is_article(row: Mapping[str, Any]) -> bool:
    """Tell texts and pictures side by side, one of them empty in each place."""
    texts = row.get("texts")
    return isinstance(texts, list) and any(isinstance(text, str) for text in texts)


def _article(row: Mapping[str, Any]) -> Iterator[str | Mapping[str, Any]]:
    """Read an article in its order: in each place a text or a picture."""
    texts, images = row["texts"], row.get("images") or [None] * len(row["texts"])
    if not isinstance(images, list) or len(images) != len(texts):
        raise SampleError(
            "placeholders",
            f"{len(texts)} texts beside {len(images)} images; each place needs one of both",
        )
    for text, image in zip(texts, images, strict=True):
        if image is not None:
            yield _item(image, "image")
        if isinstance(text, str) and text.strip():
            yield text


def _tools(given: Any) -> Any:
    """Read tools, which some files hold as JSON in a string."""
    try:
        found = json.loads(given.strip() or "null") if isinstance(given, str) else given
    except ValueError as error:
        raise SampleError("messages", f"tools is not JSON: {error}") from error
    if not found:
        return None
    if not isinstance(found, list | tuple) or not all(isinstance(tool, Mapping) for tool in found):
        raise SampleError("messages", f"tools is {found!r:.40}; it must be a list of objects")
    return found


def _a_list(given: Any, key: str) -> list[Any]:
    if not isinstance(given, list | tuple) or not given:
        raise SampleError("messages", f"{key} is {given!r:.40}; it must be a list with turns")
    return list(given)
