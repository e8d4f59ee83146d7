"""Messages as people write them -> Message and its parts, whichever dialect they were written in.

Qwen's content items ({"type": "image", "image": ...}), Hugging Face's ({"type": "image", "url":
...}) and OpenAI's ({"type": "image_url", "image_url": {"url": ...}}) become the same few parts;
any role may hold media. What is not understood is refused by its path, never dropped. Nothing is
opened or rendered here. (Schema: qwen-vl-utils, HF chat templates, OpenAI chat completions.)
Next: tools.py, then chat.py.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from qwen2vl.errors import InputError
from qwen2vl.grounding import Ref
from qwen2vl.processor.media.source import NO_OPTIONS, MediaOptions

__all__ = [
    "ROLES",
    "Call",
    "Kind",
    "MarkPart",
    "MediaPart",
    "Message",
    "Part",
    "TextPart",
    "normalize",
    "read_media",
]

Kind = Literal["image", "video"]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class TextPart:
    """Words. `given` marks what stands in an assistant's turn but was not written by it."""

    text: str
    given: bool = False


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image or a video, not opened yet."""

    kind: Kind
    source: Any  # path, URL, bytes, PIL image, array, list of frames: media.py knows
    options: MediaOptions
    path: str  # where it stands, as "messages[0].content[1]"


@dataclass(frozen=True, slots=True)
class MarkPart:
    """A place in a picture, in pixels of the picture as given."""

    kind: Literal["box", "point", "quad"]
    numbers: tuple[float, ...]
    picture: int | None  # 1-based, as in "Picture 1: "; None is the latest one before
    path: str
    given: bool = False


Part = TextPart | MediaPart | MarkPart


@dataclass(frozen=True, slots=True)
class Call:
    """A tool that the assistant asks for; `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message, read."""

    role: str
    parts: tuple[Part, ...]
    path: str
    calls: tuple[Call, ...] = ()  # of an assistant
    call_id: str | None = None  # of a tool's result


def normalize(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Read a conversation in any of the three dialects.

    Raises:
        InputError: something is missing, unknown or of the wrong kind; the text names its path.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InputError(
            'messages must be a list of {"role": ..., "content": ...}, got '
            f"{type(messages).__name__}"
        )
    if not messages:
        raise InputError('messages is empty; give at least {"role": "user", "content": ...}')
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def read_media(kind: Kind, given: Any, path: str) -> MediaPart:
    """Read one image or video: a bare source, or a content item with its options."""
    if not isinstance(given, Mapping):
        return MediaPart(kind, given, NO_OPTIONS, path)
    item = _present(given)
    item.setdefault("type", kind)
    if _TYPES.get(item["type"]) != kind:
        raise InputError(f"{path}: expected {_a(kind)}, got type {item['type']!r}")
    return _media(kind, item, path)


# Messages -------------------------------------------------------------------------------------

_KEYS_OF_ROLE = {"assistant": {"tool_calls"}, "tool": {"tool_call_id", "name"}}
_KEYS_OF_CALL = {"id", "type"}  # and "function", or what it would hold
_KEYS_OF_FUNCTION = {"name", "arguments"}


def _message(raw: Any, path: str) -> Message:
    if not isinstance(raw, Mapping):
        raise InputError(f'{path} must be {{"role": ..., "content": ...}}, got {raw!r:.60}')
    message = _present(raw)
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f"{path}.role is {role!r}; known roles: {', '.join(ROLES)}")
    _refuse_unknown(message, {"role", "content"} | _KEYS_OF_ROLE.get(role, set()), path)
    calls = tuple(_calls(message.get("tool_calls", ()), f"{path}.tool_calls"))
    if "content" not in message and not calls:
        raise InputError(f"{path}.content is missing or null; give a string or a list of items")
    parts = tuple(_parts(message.get("content", ""), f"{path}.content"))
    if role == "user" and not parts:
        raise InputError(f"{path}.content is empty; a user's turn needs text, an image or a video")
    return Message(role, parts, path, calls, message.get("tool_call_id"))


def _parts(content: Any, path: str) -> Iterable[Part]:
    if isinstance(content, str):
        return [TextPart(content)] if content else []
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InputError(
            f"{path} must be a string or a list of items, got {type(content).__name__}"
        )
    return [_part(item, f"{path}[{i}]") for i, item in enumerate(content)]


def _calls(raw: Any, path: str) -> Iterable[Call]:
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise InputError(f"{path} must be a list, got {type(raw).__name__}")
    for i, call in enumerate(raw):
        yield _call(call, f"{path}[{i}]")


def _call(raw: Any, path: str) -> Call:
    """Read {"id": ..., "function": {"name": ..., "arguments": ...}}, or its function alone."""
    call = _present(raw) if isinstance(raw, Mapping) else {}
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(
            f'{path} must be {{"function": {{"name": ..., "arguments": ...}}}}, got {raw!r:.80}'
        )
    nested = "function" in call
    _refuse_unknown(call, _KEYS_OF_CALL | ({"function"} if nested else _KEYS_OF_FUNCTION), path)
    function = _present(function)
    if nested:
        _refuse_unknown(function, _KEYS_OF_FUNCTION, f"{path}.function")
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(function["name"], arguments, call.get("id"))


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
_NUMBERS = {"box": 4, "point": 2, "quad": 8}
_FAR = 1e9  # pixels: no picture reaches so far, and arithmetic never overflows below


def _part(raw: Any, path: str) -> Part:
    if not isinstance(raw, Mapping):
        raise InputError(f'{path} must be {{"type": ..., ...}}, got {raw!r:.60}')
    item = _present(raw)
    kind = _kind_of(item, path)
    if kind in _SOURCES:
        return _media(kind, item, path)
    if kind in _NUMBERS:
        return _mark(kind, item, path)
    _refuse_unknown(item, {"type", kind}, path)
    value = item.get(kind)
    if not isinstance(value, str):
        raise InputError(f"{path}.{kind} must be a string, got {type(value).__name__}")
    return TextPart(value if kind == "text" else Ref(value).to_text())


def _kind_of(item: Mapping[str, Any], path: str) -> Any:
    """Tell what an item is by its type, or else by the key that holds its content."""
    given = item.get("type")
    if given is not None:
        if not isinstance(given, str) or given not in _TYPES:
            raise InputError(f"{path}.type is {given!r}; {_known(str(given), _TYPES)}")
        return _TYPES[given]
    kinds = {_TYPES[key] for key in item if key in _TYPES}
    if len(kinds) != 1:
        found = ", ".join(map(repr, item)) or "none"
        raise InputError(f'{path} has no "type", and its keys ({found}) do not tell what it is')
    return kinds.pop()


def _media(kind: Any, item: Mapping[str, Any], path: str) -> MediaPart:
    names, options = _SOURCES[kind], _OPTIONS[kind]
    _refuse_unknown(item, {"type", *names} | options, path)
    given = [name for name in names if name in item]
    if len(given) != 1:
        raise InputError(
            f"{path} needs one source ({', '.join(names)}), got {' and '.join(given) or 'none'}"
        )
    source = item[given[0]]
    if isinstance(source, Mapping):
        source = _url_of(source, f"{path}.{given[0]}")
    elif given[0] == "base64":
        source = f"data:;base64,{source}"
    chosen = {name: item[name] for name in options if name in item}
    if not chosen:
        return MediaPart(kind, source, NO_OPTIONS, path)
    try:
        return MediaPart(kind, source, MediaOptions(**chosen), path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _url_of(source: Mapping[str, Any], path: str) -> Any:
    """Read OpenAI's {"url": ..., "detail": "auto"}."""
    fields = _present(source)
    _refuse_unknown(fields, {"url", "detail"}, path)
    if fields.get("detail", "auto") != "auto":
        raise InputError(
            f"{path}.detail is {fields['detail']!r}, only 'auto' is supported; set max_pixels on "
            "the item instead"
        )
    if "url" not in fields:
        raise InputError(f"{path}.url is missing")
    return fields["url"]


def _mark(kind: Any, item: Mapping[str, Any], path: str) -> MarkPart:
    _refuse_unknown(item, {"type", kind, "picture"}, path)
    count, picture = _NUMBERS[kind], item.get("picture")
    numbers = _numbers(item.get(kind))
    if len(numbers) != count:
        raise InputError(f"{path}.{kind} must be {count} numbers in pixels, got {item.get(kind)!r}")
    if kind == "box" and (numbers[0] > numbers[2] or numbers[1] > numbers[3]):
        raise InputError(
            f"{path}.box is {list(numbers)}: x2 and y2 must not be smaller than x1 and y1"
        )
    if picture is not None and (not isinstance(picture, int) or picture < 1):
        raise InputError(f"{path}.picture is {picture!r}; pictures are numbered from 1")
    return MarkPart(kind, numbers, picture, path)


def _numbers(given: Any) -> tuple[float, ...]:
    """Read [x, y, ...] or [[x, y], ...]; what is not made of usable numbers gives none."""
    if not isinstance(given, list | tuple):
        return ()
    flat = [n for entry in given for n in (entry if isinstance(entry, list | tuple) else [entry])]
    numbers = all(isinstance(n, Real) and not isinstance(n, bool) for n in flat)
    return tuple(flat) if numbers and all(abs(n) < _FAR for n in flat) else ()


# Keys -----------------------------------------------------------------------------------------


def _present(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Drop keys whose value is None: tables of examples fill absent keys with it."""
    return {key: value for key, value in raw.items() if value is not None}


def _refuse_unknown(item: Mapping[str, Any], known: set[str], path: str) -> None:
    for key in item:
        if key not in known:
            raise InputError(f"{path} has an unknown key {key!r}; {_known(str(key), known)}")


def _known(word: str, known: Iterable[str]) -> str:
    """Suggest the nearest known word, or list them all."""
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
