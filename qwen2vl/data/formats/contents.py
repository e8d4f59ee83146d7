"""Contents of messages: tags and items without a source become the row's media and objects.

    "<image>Find <ref-object>"                    tags in text
    [{"type": "image"}, {"type": "text", ...}]    items, with an index or in order
    "Find it", in a row with images               neither: the images precede the first message

A row has tags or items, not both: where the media are would be ambiguous.
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


def fill_contents(
    messages: Sequence[RawMessage], row: Row, always_tagged: bool
) -> list[RawMessage]:
    """Replace tags and items without a source by the row's media and objects.

    Args:
        messages: with role and content.
        row: of the file.
        always_tagged: tags are placeholders in rows without media, too, and media need a tag each.

    Raises:
        SampleError: media or objects do not match their tags, or a placeholder would be taught.
    """
    media = RowMedia(row)
    contents = [message.get("content") for message in messages]
    texts = [text for content in contents for text in _texts(content)]
    for text in texts:
        media.check_text(text)
    objects = RowObjects(row, is_tagged=any(OBJECT_TAG.search(text) for text in texts))
    items = [item for content in contents for item in _media_items(content)]
    has_tags = (media.has_columns or always_tagged) and any(MEDIA_TAG.search(t) for t in texts)
    _check_one_way(contents, items, has_tags)
    _check_calls(messages, media, objects)
    filler = _Filler(media if has_tags else None, media, objects)
    filled = [filler.fill(content) for content in contents]
    if media.is_given and not (has_tags or items or always_tagged):
        _put_first(media.take_remaining(), messages, filled)
    media.check_all_used()
    objects.check_all_used()
    return [
        message if content is None else {**message, "content": content}
        for message, content in zip(messages, filled, strict=True)
    ]


def _check_one_way(
    contents: Sequence[Any], items: Sequence[Mapping[str, Any]], has_tags: bool
) -> None:
    """Refuse tags in the text of a row whose images or videos are items, which place them."""
    is_mixed = has_tags and bool(items)
    for content in contents:
        if any(True for _ in _media_items(content)):
            is_mixed |= any(MEDIA_TAG.search(text) for text in _texts(content))
    if is_mixed:
        raise SampleError(
            "placeholders",
            'the text has <image> or <video> tags beside items such as {"type": "image"}; use one '
            "of the two to say where the media are",
        )


def _check_calls(messages: Sequence[RawMessage], media: RowMedia, objects: RowObjects) -> None:
    """Refuse tags in the arguments of tool calls, which are text only."""
    for message in messages:
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


def _put_first(
    items: Sequence[Mapping[str, Any]], messages: Sequence[RawMessage], contents: list[Any]
) -> None:
    """Put media that nothing refers to before the first message, as TRL and ms-swift do."""
    for i, message in enumerate(messages):
        if message.get("role") != "system":
            content = contents[i]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}] if content else []
            contents[i] = [*items, *(content if isinstance(content, list) else [])]
            return


def _texts(content: Any) -> Iterator[str]:
    """Yield the texts of a message's content."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for item in content:
            text = item.get("text") if isinstance(item, Mapping) else item
            if isinstance(text, str):
                yield text


def _media_items(content: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the items of a content that are, or stand for, an image or a video."""
    for item in content if isinstance(content, list) else ():
        if isinstance(item, Mapping) and (
            item.get("type") in ("image", "image_url", "input_image", "video", "video_url")
            or ("type" not in item and not item.keys().isdisjoint(("image", "image_url", "video")))
        ):
            yield item


@dataclass(frozen=True, slots=True)
class _Filler:
    """Replaces tags and items without a source in one row's contents, in order."""

    tagged_media: RowMedia | None  # None: <image> and <video> in text are text
    media: RowMedia
    objects: RowObjects

    def fill(self, content: Any) -> Any:
        """Return the content of a message with its media and objects."""
        if isinstance(content, str):
            items = list(self._split(content))
            is_changed = items != [{"type": "text", "text": content}]
            return items if items and is_changed else content
        if not isinstance(content, list):
            return content
        return [filled for item in content for filled in self._fill_item(item)]

    def _fill_item(self, item: Any) -> Iterator[Any]:
        if not isinstance(item, Mapping):
            yield item
        elif item.get("type") in ("image", "video"):
            yield _read_embedded(item) if _has_source(item) else self._use_medium(item)
        elif item.get("type", "text") == "text" and isinstance(item.get("text"), str):
            split = list(self._split(item["text"]))
            yield from split if len(split) != 1 or split[0].get("type") != "text" else [item]
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

    def _split(self, text: str) -> Iterator[Mapping[str, Any]]:
        parts = [text] if self.tagged_media is None else self.tagged_media.split(text)
        for part in parts:
            if not isinstance(part, str):
                yield part
            elif self.objects.is_active:
                yield from self.objects.split(part)
            elif part:
                yield {"type": "text", "text": part}


def _has_source(item: Mapping[str, Any]) -> bool:
    """Return whether an item has its own image or video; an empty one is none."""
    return any(item.get(k) for k in (item["type"], f"{item['type']}_url", "url", "path", "base64"))


def _read_embedded(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an item whose image may be embedded as parquet's {"bytes": ..., "path": ...}."""
    source = item.get(item["type"])
    if isinstance(source, Mapping) and not source.keys().isdisjoint(("bytes", "path")):
        return {**item, **(media_item(source, item["type"]) or {})}
    return item
