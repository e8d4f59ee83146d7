"""Parsing and validation of chat messages in three formats: Qwen, Hugging Face and OpenAI.

Content items of qwen-vl-utils ({"type": "image", "image": ...}), Hugging Face ({"type": "image",
"url": ...}) and OpenAI ({"type": "image_url", "image_url": {"url": ...}}) are converted to the
same `Message` and parts (text, media, grounding). Media are allowed in every role. Unknown keys
and types raise InputError with the path of the item; nothing is dropped silently. No media are
opened and nothing is rendered here. (qwen_vl_utils: extract_vision_info.)
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from qwen2vl.errors import InputError
from qwen2vl.grounding import ObjectRef
from qwen2vl.processor.media.source import NO_OPTIONS, MediaOptions

__all__ = [
    "ROLES",
    "GroundingPart",
    "MediaPart",
    "Message",
    "Modality",
    "Part",
    "TextPart",
    "ToolCall",
    "parse_media_item",
    "parse_messages",
]

Modality = Literal["image", "video"]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text. `from_tool` marks tool output inside an assistant's turn, which is not supervised."""

    text: str
    from_tool: bool = False


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image or a video that has not been opened yet."""

    kind: Modality
    source: Any  # path, URL, bytes, PIL image, array, list of frames: see media/source.py
    options: MediaOptions
    path: str  # location in the messages, as "messages[0].content[1]"


@dataclass(frozen=True, slots=True)
class GroundingPart:
    """A box, point or quad, in pixels of the original image (visual grounding)."""

    kind: Literal["box", "point", "quad"]
    numbers: tuple[float, ...]
    image_number: int | None  # 1-based, as in "Picture 1: "; None: the latest image before it
    path: str
    from_tool: bool = False


Part = TextPart | MediaPart | GroundingPart


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the assistant; `arguments` is the JSON text that the model generated."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One parsed message."""

    role: str
    parts: tuple[Part, ...]
    path: str
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant
    tool_call_id: str | None = None  # of a tool's result


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Parse and validate a conversation in any of the three formats.

    Raises:
        InputError: something is missing, unknown or of the wrong type; the text names its path.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InputError(
            'messages must be a list of {"role": ..., "content": ...}, got '
            f"{type(messages).__name__}"
        )
    if not messages:
        raise InputError('messages is empty; give at least {"role": "user", "content": ...}')
    return [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def parse_media_item(kind: Modality, source: Any, path: str) -> MediaPart:
    """Parse one image or video: a bare source, or a content item with its options."""
    if not isinstance(source, Mapping):
        return MediaPart(kind, source, NO_OPTIONS, path)
    item = _drop_none(source)
    item.setdefault("type", kind)
    if _TYPES.get(item["type"]) != kind:
        raise InputError(f"{path}: expected {_with_article(kind)}, got type {item['type']!r}")
    return _parse_media(kind, item, path)


# Messages -------------------------------------------------------------------------------------

_KEYS_OF_ROLE = {"assistant": {"tool_calls"}, "tool": {"tool_call_id", "name"}}
_KEYS_OF_CALL = {"id", "type"}  # and "function", or the keys of the function itself
_KEYS_OF_FUNCTION = {"name", "arguments"}


def _parse_message(raw: Any, path: str) -> Message:
    if not isinstance(raw, Mapping):
        raise InputError(f'{path} must be {{"role": ..., "content": ...}}, got {raw!r:.60}')
    message = _drop_none(raw)
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f"{path}.role is {role!r}; known roles: {', '.join(ROLES)}")
    _refuse_unknown(message, {"role", "content"} | _KEYS_OF_ROLE.get(role, set()), path)
    tool_calls = tuple(_parse_tool_calls(message.get("tool_calls", ()), f"{path}.tool_calls"))
    if "content" not in message and not tool_calls:
        raise InputError(f"{path}.content is missing or null; give a string or a list of items")
    parts = tuple(_parse_content(message.get("content", ""), f"{path}.content"))
    if role == "user" and not parts:
        raise InputError(f"{path}.content is empty; a user's turn needs text, an image or a video")
    return Message(role, parts, path, tool_calls, message.get("tool_call_id"))


def _parse_content(content: Any, path: str) -> Iterable[Part]:
    if isinstance(content, str):
        return [TextPart(content)] if content else []
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InputError(
            f"{path} must be a string or a list of items, got {type(content).__name__}"
        )
    return [_parse_part(item, f"{path}[{i}]") for i, item in enumerate(content)]


def _parse_tool_calls(raw: Any, path: str) -> Iterable[ToolCall]:
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise InputError(f"{path} must be a list, got {type(raw).__name__}")
    for i, call in enumerate(raw):
        yield _parse_tool_call(call, f"{path}[{i}]")


def _parse_tool_call(raw: Any, path: str) -> ToolCall:
    """Parse {"id": ..., "function": {"name": ..., "arguments": ...}}, or its function alone."""
    call = _drop_none(raw) if isinstance(raw, Mapping) else {}
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(
            f'{path} must be {{"function": {{"name": ..., "arguments": ...}}}}, got {raw!r:.80}'
        )
    nested = "function" in call
    _refuse_unknown(call, _KEYS_OF_CALL | ({"function"} if nested else _KEYS_OF_FUNCTION), path)
    function = _drop_none(function)
    if nested:
        _refuse_unknown(function, _KEYS_OF_FUNCTION, f"{path}.function")
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(function["name"], arguments, call.get("id"))


# Content items --------------------------------------------------------------------------------

_TYPES: Mapping[str, str] = {
    "text": "text",
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
    "ref": "ref",
    "box": "box",
    "point": "point",
    "quad": "quad",
}
_SOURCES = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path"),
}
_IMAGE_OPTIONS = {"min_pixels", "max_pixels", "resized_height", "resized_width"}
_OPTIONS = {
    "image": _IMAGE_OPTIONS,
    "video": _IMAGE_OPTIONS
    | {"fps", "nframes", "min_frames", "max_frames", "total_pixels", "video_start", "video_end"},
}
_NUM_COORDINATES = {"box": 4, "point": 2, "quad": 8}
_MAX_COORDINATE = 1e9  # pixels: larger than any image, and small enough never to overflow


def _parse_part(raw: Any, path: str) -> Part:
    if not isinstance(raw, Mapping):
        raise InputError(f'{path} must be {{"type": ..., ...}}, got {raw!r:.60}')
    item = _drop_none(raw)
    kind = _item_type(item, path)
    if kind in _SOURCES:
        return _parse_media(kind, item, path)
    if kind in _NUM_COORDINATES:
        return _parse_grounding(kind, item, path)
    _refuse_unknown(item, {"type", kind}, path)
    value = item.get(kind)
    if not isinstance(value, str):
        raise InputError(f"{path}.{kind} must be a string, got {type(value).__name__}")
    return TextPart(value if kind == "text" else ObjectRef(value).to_text())


def _item_type(item: Mapping[str, Any], path: str) -> Any:
    """Return the type of an item by its "type", or else by the key that holds its content."""
    declared = item.get("type")
    if declared is not None:
        if not isinstance(declared, str) or declared not in _TYPES:
            raise InputError(f"{path}.type is {declared!r}; {_suggest(str(declared), _TYPES)}")
        return _TYPES[declared]
    kinds = {_TYPES[key] for key in item if key in _TYPES}
    if len(kinds) != 1:
        found = ", ".join(map(repr, item)) or "none"
        raise InputError(f'{path} has no "type", and its keys ({found}) do not imply one')
    return kinds.pop()


def _parse_media(kind: Any, item: Mapping[str, Any], path: str) -> MediaPart:
    names, options = _SOURCES[kind], _OPTIONS[kind]
    _refuse_unknown(item, {"type", *names} | options, path)
    found = [name for name in names if name in item]
    if len(found) != 1:
        raise InputError(
            f"{path} needs one source ({', '.join(names)}), got {' and '.join(found) or 'none'}"
        )
    source = item[found[0]]
    if isinstance(source, Mapping):
        source = _parse_image_url(source, f"{path}.{found[0]}")
    elif found[0] == "base64":
        source = f"data:;base64,{source}"
    chosen = {name: item[name] for name in options if name in item}
    if not chosen:
        return MediaPart(kind, source, NO_OPTIONS, path)
    try:
        return MediaPart(kind, source, MediaOptions(**chosen), path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _parse_image_url(source: Mapping[str, Any], path: str) -> Any:
    """Parse OpenAI's {"url": ..., "detail": "auto"}."""
    fields = _drop_none(source)
    _refuse_unknown(fields, {"url", "detail"}, path)
    if fields.get("detail", "auto") != "auto":
        raise InputError(
            f"{path}.detail is {fields['detail']!r}, only 'auto' is supported; set max_pixels on "
            "the item instead"
        )
    if "url" not in fields:
        raise InputError(f"{path}.url is missing")
    return fields["url"]


def _parse_grounding(kind: Any, item: Mapping[str, Any], path: str) -> GroundingPart:
    _refuse_unknown(item, {"type", kind, "picture"}, path)
    count, image_number = _NUM_COORDINATES[kind], item.get("picture")
    numbers = _parse_coordinates(item.get(kind))
    if len(numbers) != count:
        raise InputError(f"{path}.{kind} must be {count} numbers in pixels, got {item.get(kind)!r}")
    if kind == "box" and (numbers[0] > numbers[2] or numbers[1] > numbers[3]):
        raise InputError(
            f"{path}.box is {list(numbers)}: x2 and y2 must not be smaller than x1 and y1"
        )
    if image_number is not None and (not isinstance(image_number, int) or image_number < 1):
        raise InputError(f"{path}.picture is {image_number!r}; images are numbered from 1")
    return GroundingPart(kind, numbers, image_number, path)


def _parse_coordinates(raw: Any) -> tuple[float, ...]:
    """Parse [x, y, ...] or [[x, y], ...]; return () for anything else."""
    if not isinstance(raw, list | tuple):
        return ()
    flat = [n for entry in raw for n in (entry if isinstance(entry, list | tuple) else [entry])]
    numbers = all(isinstance(n, Real) and not isinstance(n, bool) for n in flat)
    return tuple(flat) if numbers and all(abs(n) < _MAX_COORDINATE for n in flat) else ()


# Keys -----------------------------------------------------------------------------------------


def _drop_none(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Drop keys whose value is None: columnar datasets fill absent keys with it."""
    return {key: value for key, value in raw.items() if value is not None}


def _refuse_unknown(item: Mapping[str, Any], known: set[str], path: str) -> None:
    for key in item:
        if key not in known:
            raise InputError(f"{path} has an unknown key {key!r}; {_suggest(str(key), known)}")


def _suggest(name: str, known: Iterable[str]) -> str:
    """Suggest the closest known name, or list them all."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
