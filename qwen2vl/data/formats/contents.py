"""Contents of messages: tags and items without a source become the row's media and objects.

    "<image>Find <ref-object>"                    tags in text
    [{"type": "image"}, {"type": "text", ...}]    items, with an index or in order
    "Find it", in a row with images               neither: the images precede the first message

A row has tags or items, not both: where the media are would be ambiguous. Tags in the assistant's
text are text, as in Qwen's own fine-tuning code: answers in Markdown or HTML may have them. A tag
in a prompt is never text, not even in a row without any medium: it would be learned in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2vl.data.formats.columns import Row
from qwen2vl.data.formats.media import MEDIA_TAG, RowMedia, media_item
from qwen2vl.data.formats.objects import OBJECT_TAG, RowObjects
from qwen2vl.data.formats.samples import SampleError

__all__ = ["fill_contents"]

RawMessage = Mapping[str, Any]

_IMAGE_TYPES = ("image", "image_url", "input_image")
_MEDIA_TYPES = (*_IMAGE_TYPES, "video", "video_url")
_TAG_IN_ANSWER = "the text <image> or <video> in an answer, where it stands for no medium"


def fill_contents(messages: Sequence[RawMessage], row: Row, needs_tags: bool) -> list[RawMessage]:
    """Replace tags and items without a source by the row's media and objects.

    Args:
        messages: with role and content.
        row: of the file.
        needs_tags: each medium needs a tag; else those of a row without tags precede its messages.

    Raises:
        SampleError: media or objects do not match their tags, or a placeholder would be text.
    """
    media = RowMedia(row)
    is_plain = [_is_plain(message) for message in messages]
    marked = [m for m, plain in zip(messages, is_plain, strict=True) if not plain]
    prompts = [text for m in marked if not _is_answer(m) for text in _texts_with_tags(m)]
    answers = [text for m in marked if _is_answer(m) for text in _texts_with_tags(m)]
    for text in prompts:
        media.check_text(text)
    found = filter(None, map(OBJECT_TAG.search, prompts + answers))
    objects = RowObjects(row, tag=next((match[0] for match in found), ""))
    has_items = any(map(_has_media_items, marked))
    has_tags = any(map(MEDIA_TAG.search, prompts))
    _check_one_way(marked, has_items and has_tags)
    _check_calls(marked, media, objects)
    hint = ""
    if any(map(MEDIA_TAG.search, answers)):
        row.add_note(_TAG_IN_ANSWER)
        hint = " (tags in answers are text)"
    filler = _Filler(media, objects)
    filled = [
        message if plain else filler.fill_message(message, has_tags)
        for message, plain in zip(messages, is_plain, strict=True)
    ]
    if media.is_given and not (has_tags or has_items or needs_tags):
        _put_first(media.take_remaining(), filled)
    if any(map(_has_own_media, marked)):
        hint = " (items with their own image or video take none of the columns)" + hint
    media.check_all_used(hint)
    objects.check_all_used()
    if objects.is_active:
        objects.check_image_ids(sum(map(_count_images, filled)))
    return filled


def _check_one_way(messages: Sequence[RawMessage], is_mixed: bool) -> None:
    """Refuse tags in the text of a row, or of a message, whose media are placed by items."""
    for message in messages:
        if not is_mixed and not _is_answer(message) and _has_media_items(message):
            is_mixed = any(map(MEDIA_TAG.search, _texts_with_tags(message)))
    if is_mixed:
        raise SampleError(
            "placeholders",
            'the text has <image> or <video> tags beside items such as {"type": "image"}; use one '
            "of the two to say where the media are",
        )


def _check_calls(messages: Sequence[RawMessage], media: RowMedia, objects: RowObjects) -> None:
    """Refuse tags in the arguments of tool calls, which are text only."""
    for message in messages:
        if "tool_calls" not in message and "function_call" not in message:
            continue
        text = str([message.get("tool_calls"), message.get("function_call")])
        media.check_text(text)
        found = (media.has_columns and MEDIA_TAG.search(text)) or (
            objects.has_column and OBJECT_TAG.search(text)
        )
        if found:
            raise SampleError(
                "placeholders",
                f"the arguments of a tool call have {found[0]}, and are text only; write what it "
                "stands for",
            )


def _put_first(items: Sequence[Mapping[str, Any]], messages: list[RawMessage]) -> None:
    """Put media that nothing refers to before the first message, as TRL and ms-swift do."""
    for i, message in enumerate(messages):
        if message.get("role") != "system":
            content = message.get("content")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}] if content else []
            content = [*items, *(content if isinstance(content, list) else [])]
            messages[i] = {**message, "content": content}
            return


def _is_plain(message: RawMessage) -> bool:
    """Return whether a message has no tag, no item and no call."""
    content = message.get("content")
    return (
        isinstance(content, str)
        and "<" not in content
        and "tool_calls" not in message
        and "function_call" not in message
    )


def _is_answer(message: RawMessage) -> bool:
    return message.get("role") == "assistant"


def _texts_with_tags(message: RawMessage) -> Iterator[str]:
    """Yield the texts of a message that may have a tag."""
    content = message.get("content")
    if isinstance(content, str):
        if "<" in content:
            yield content
    elif isinstance(content, list):
        for item in content:
            text = item.get("text") if isinstance(item, dict) else item
            if isinstance(text, str) and "<" in text:
                yield text


def _has_media_items(message: RawMessage) -> bool:
    """Return whether a message has items that are, or stand for, an image or a video."""
    content = message.get("content")
    return isinstance(content, list) and any(
        isinstance(item, dict)
        and (
            item.get("type") in _MEDIA_TYPES
            or ("type" not in item and not item.keys().isdisjoint(_MEDIA_TYPES))
        )
        for item in content
    )


def _has_own_media(message: RawMessage) -> bool:
    """Return whether a message has an item with its own image or video."""
    content = message.get("content")
    return isinstance(content, list) and any(
        isinstance(item, dict) and item.get("type") in _MEDIA_TYPES and _has_source(item)
        for item in content
    )


def _count_images(message: RawMessage) -> int:
    content = message.get("content")
    return sum(
        isinstance(item, dict) and (item.get("type") in _IMAGE_TYPES or "image" in item)
        for item in (content if isinstance(content, list) else [])
    )


@dataclass(frozen=True, slots=True)
class _Filler:
    """Replaces tags and items without a source in one row's contents, in order."""

    media: RowMedia
    objects: RowObjects

    def fill_message(self, message: RawMessage, has_media_tags: bool) -> RawMessage:
        """Return a message with its media and objects.

        Args:
            message: of the row.
            has_media_tags: a prompt of the row has <image> or <video>.
        """
        has_media_tags = has_media_tags and not _is_answer(message)
        content = message.get("content")
        if isinstance(content, list):
            filled = [item for raw in content for item in self._fill_item(raw, has_media_tags)]
            return {**message, "content": filled}
        if not isinstance(content, str):
            return message
        items = list(self._split(content, has_media_tags))
        is_text = not items or items == [{"type": "text", "text": content}]
        return message if is_text else {**message, "content": items}

    def _fill_item(self, item: Any, has_media_tags: bool) -> Iterator[Any]:
        if not isinstance(item, dict):
            yield item
        elif item.get("type") in ("image", "video"):
            yield _read_embedded(item) if _has_source(item) else self._use_medium(item)
        elif item.get("type", "text") == "text" and "<" in str(item.get("text")):
            items = list(self._split(str(item["text"]), has_media_tags))
            is_text = len(items) == 1 and items[0].get("type") == "text"
            yield from [item] if is_text else items
        else:
            yield item

    def _use_medium(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        kind = item["type"]
        options = {key: value for key, value in item.items() if value != "" and key != "index"}
        options.pop(kind, None)
        medium = (
            self.media.item_at(kind, item["index"])
            if "index" in item
            else self.media.next_item(kind)
        )
        return {**options, **medium}

    def _split(self, text: str, has_media_tags: bool) -> Iterator[Mapping[str, Any]]:
        for part in self.media.split(text) if has_media_tags else [text]:
            if not isinstance(part, str):
                yield part
            elif self.objects.is_active:
                yield from self.objects.split(part)
            else:
                yield {"type": "text", "text": part}


def _has_source(item: Mapping[str, Any]) -> bool:
    """Return whether an item has its own image or video; an empty one is none."""
    kind = item["type"].removesuffix("_url").removeprefix("input_")
    return any(item.get(key) for key in (kind, f"{kind}_url", "url", "path", "base64"))


def _read_embedded(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an item whose image may be embedded as parquet's {"bytes": ..., "path": ...}."""
    source = item.get(item["type"])
    if isinstance(source, Mapping) and not source.keys().isdisjoint(("bytes", "path")):
        return {**item, **(media_item(source, item["type"]) or {})}
    return item
