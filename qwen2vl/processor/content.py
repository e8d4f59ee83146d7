"""Content items of a message: text, images, videos and boxes, in three formats.

Items of qwen-vl-utils ({"type": "image", "image": ...}), Hugging Face ({"type": "image", "url":
...}) and OpenAI ({"type": "image_url", "image_url": {"url": ...}}, and {"type": "input_image", ...}
of the Responses API) become the same parts. Unknown keys and types raise InputError with the path
of the item. Keys without a meaning for the model are ignored (docs/guides/ask.md lists them); no
other key is. No media are opened here. (qwen_vl_utils: extract_vision_info.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from qwen2vl.errors import InputError, Qwen2VLError, UnknownKeyError, abbreviate, suggest
from qwen2vl.grounding import ObjectRef
from qwen2vl.processor.media_options import NO_OPTIONS, MediaOptions

__all__ = [
    "GroundingPart",
    "MediaPart",
    "Modality",
    "Part",
    "TextPart",
    "add_param",
    "parse_content",
    "parse_media_item",
    "read_mapping",
    "refuse_unknown",
]

Modality = Literal["image", "video"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text. `is_context` marks what is not supervised in an assistant's turn, as tool output."""

    text: str
    is_context: bool = False


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image or a video that has not been opened yet."""

    kind: Modality
    source: Any  # path, URL, bytes, file, PIL image, array, list of frames: see media/source.py
    options: MediaOptions
    path: str  # location in the messages, as "messages[0].content[1]"


@dataclass(frozen=True, slots=True)
class GroundingPart:
    """A box, point or quad, in pixels of the original image (visual grounding)."""

    kind: Literal["box", "point", "quad"]
    numbers: tuple[float, ...]
    image_number: int | None  # 1-based, as in "Picture 1: "; None: the latest image before it
    path: str
    is_context: bool = False  # not supervised in an assistant's turn, as tool output


Part = TextPart | MediaPart | GroundingPart


_TYPES: Mapping[str, str] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "ref": "ref",
    "box": "box",
    "point": "point",
    "quad": "quad",
}
_NO_AUDIO = "audio is not supported; give a transcript as text"
_NO_FILES = "documents are not read; give their text, or their pages as images"
_REFUSED_TYPES = {
    "audio": _NO_AUDIO,
    "audio_url": _NO_AUDIO,
    "input_audio": _NO_AUDIO,
    "file": _NO_FILES,
    "input_file": _NO_FILES,
}
_REFUSED_KEYS = {
    "audio": _NO_AUDIO,
    "file_id": "files uploaded to OpenAI cannot be read here; give the image as image_url",
    "reasoning": "the chat template has no place for reasoning; remove it",
    "reasoning_content": "the chat template has no place for reasoning; remove it",
    "thinking": "the chat template has no place for reasoning; remove it",
}
# Hints for caches of other servers, and what OpenAI's client adds to an answer.
_CACHE_KEYS = {"prompt_cache_breakpoint", "cache_control"}
_IGNORED_KEYS: Mapping[str, Set[str]] = {
    "text": {"annotations", "logprobs", "parsed", *_CACHE_KEYS},
    "image": {"uuid", *_CACHE_KEYS},
    "video": {"uuid", *_CACHE_KEYS},
}
_SOURCES = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path"),
}
_LOCAL_SOURCES = {"path"}  # not named in errors, which clients of a server get, too
_IMAGE_OPTIONS = {"min_pixels", "max_pixels", "resized_height", "resized_width", "detail"}
_OPTIONS = {
    "image": _IMAGE_OPTIONS,
    "video": _IMAGE_OPTIONS
    | {"fps", "nframes", "min_frames", "max_frames", "total_pixels", "video_start", "video_end"}
    | {"frame_interval", "frame_times", "segment_frames", "subtitles"},
}
_ALIASES = {"num_frames": "nframes"}  # vLLM's and transformers' name -> qwen-vl-utils' name
_NUM_COORDINATES = {"box": 4, "point": 2, "quad": 8}
_MAX_COORDINATE = 1e9  # pixels: larger than any image, and small enough never to overflow


def parse_content(content: Any, path: str) -> Iterable[Part]:
    """Parse the content of a message: a string or a list of items.

    Raises:
        InputError: something is missing, unknown or of the wrong type; the text names its path.
    """
    if isinstance(content, str):
        return [TextPart(content)] if content else []
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray | memoryview):
        raise InputError(
            f"{path} must be a string or a list of items, got {type(content).__name__}"
        )
    return [_parse_item(item, f"{path}[{i}]") for i, item in enumerate(content)]


def parse_media_item(kind: Modality, source: Any, path: str) -> MediaPart:
    """Parse one image or video: a bare source, or a content item with its options.

    Raises:
        InputError: the item is of another type, or something is missing, unknown or of the wrong
            type; `param` is `path`.
    """
    item = read_mapping(source)
    if item is None:
        return MediaPart(kind, source, NO_OPTIONS, path)
    with add_param(path):
        return _parse_media_of_kind(kind, item, path)


@contextmanager
def add_param(path: str) -> Iterator[None]:
    """Set `param` of errors that leave the context to `path`, unless it is set already."""
    try:
        yield
    except Qwen2VLError as error:
        error.param = error.param or path
        raise


def _parse_media_of_kind(kind: Modality, item: dict[str, Any], path: str) -> MediaPart:
    item.setdefault("type", kind)
    if _item_type(item, path) != kind:
        raise InputError(
            f"{path}: expected {_with_article(kind)}, got type {abbreviate(item['type'])}; give it "
            f"as {kind}, or change the placeholder"
        )
    return _parse_media(kind, item, path)


# Keys -----------------------------------------------------------------------------------------


def read_mapping(raw: Any) -> dict[str, Any] | None:
    """Return the keys of a mapping or of an object with `model_dump`; None for anything else.

    Keys that are None are dropped: columnar datasets and OpenAI's client fill absent keys with it.
    """
    if not isinstance(raw, Mapping) and not isinstance(raw, type):
        dump = getattr(raw, "model_dump", None)
        raw = dump() if callable(dump) else None
    if not isinstance(raw, Mapping):
        return None
    return {key: value for key, value in raw.items() if value is not None}


def refuse_unknown(
    item: Mapping[str, Any], known: Set[str], path: str, ignored: Set[str] = frozenset()
) -> None:
    """Raise InputError for the first key that is neither known nor ignored."""
    for key in item:
        if key in known or key in ignored:
            continue
        if key in _REFUSED_KEYS:
            raise InputError(f"{path}.{key} cannot be used: {_REFUSED_KEYS[key]}")
        known = known - _LOCAL_SOURCES
        raise UnknownKeyError(
            f"{path} has an unknown key {abbreviate(key)}; {_suggest(key, known)}"
        )


def _suggest(value: Any, known: Iterable[str]) -> str:
    return suggest(value if isinstance(value, str) else "", known)


# Items ----------------------------------------------------------------------------------------


def _parse_item(raw: Any, path: str) -> Part:
    with add_param(path):
        return _parse_part(raw, path)


def _parse_part(raw: Any, path: str) -> Part:
    item = read_mapping(raw)
    if item is None:
        raise InputError(f'{path} must be {{"type": ..., ...}}, got {abbreviate(raw)}')
    kind = _item_type(item, path)
    if kind in _SOURCES:
        return _parse_media(kind, item, path)
    if kind in _NUM_COORDINATES:
        return _parse_grounding(kind, item, path)
    refuse_unknown(item, {"type", kind}, path, _IGNORED_KEYS.get(kind, frozenset()))
    value = item.get(kind)
    if not isinstance(value, str):
        raise InputError(f"{path}.{kind} must be a string, got {type(value).__name__}")
    return TextPart(ObjectRef(value).to_text() if kind == "ref" else value)


def _item_type(item: Mapping[str, Any], path: str) -> Any:
    """Return the type of an item by its "type", or else by the key that holds its content."""
    declared = item.get("type")
    if declared is None:
        kinds = {_TYPES[key] for key in item if key in _TYPES}
        if len(kinds) == 1:
            return kinds.pop()
        raise InputError(
            f'{path} has no "type", and its keys ({_list_keys(item)}) do not imply one; add "type"'
        )
    if isinstance(declared, str):
        if declared in _TYPES:
            return _TYPES[declared]
        if declared in _REFUSED_TYPES:
            raise InputError(f"{path}.type is {declared!r}: {_REFUSED_TYPES[declared]}")
    raise InputError(f"{path}.type is {abbreviate(declared)}; {_suggest(declared, _TYPES)}")


def _list_keys(item: Mapping[str, Any]) -> str:
    return ", ".join(abbreviate(key) for key in list(item)[:9]) or "none"


def _parse_media(kind: Any, item: Mapping[str, Any], path: str) -> MediaPart:
    names, options = _SOURCES[kind], _OPTIONS[kind]
    given, item = item, _replace_aliases(item, options, path)
    refuse_unknown(item, {"type", *names} | options, path, _IGNORED_KEYS.get(kind, frozenset()))
    found = [name for name in names if name in item]
    if len(found) != 1:
        shown = ", ".join(name for name in names if name not in _LOCAL_SOURCES)
        raise InputError(f"{path} needs one source ({shown}), got {' and '.join(found) or 'none'}")
    source = item[found[0]]
    chosen = {name: item[name] for name in options if name in item}
    fields = read_mapping(source)
    if fields is not None:
        source = _parse_image_url(fields, chosen, f"{path}.{found[0]}")
    elif found[0] == "base64":
        if not isinstance(source, str):
            raise InputError(f"{path}.base64 must be a string, got {type(source).__name__}")
        source = f"data:;base64,{source}"
    if not chosen:
        return MediaPart(kind, source, NO_OPTIONS, path)
    try:
        return MediaPart(kind, source, MediaOptions(**chosen), path)
    except InputError as error:
        text = str(error)
        for alias, name in _ALIASES.items():
            text = text.replace(name, alias) if alias in given else text
        raise InputError(f"{path}: {text}") from error


def _replace_aliases(item: Mapping[str, Any], options: Set[str], path: str) -> Mapping[str, Any]:
    found = [alias for alias, name in _ALIASES.items() if alias in item and name in options]
    for alias in found:
        if _ALIASES[alias] in item:
            raise InputError(
                f"{path}.{alias} and {path}.{_ALIASES[alias]} mean the same, and both are given; "
                "give one"
            )
    return {_ALIASES[key] if key in found else key: value for key, value in item.items()}


def _parse_image_url(fields: Mapping[str, Any], chosen: dict[str, Any], path: str) -> Any:
    """Parse OpenAI's {"url": ..., "detail": "auto"}; add the detail to the options chosen."""
    refuse_unknown(fields, {"url", "detail"}, path)
    if "url" not in fields:
        raise InputError(f'{path}.url is missing; give {{"url": ...}}')
    if "detail" in fields:
        if "detail" in chosen:
            raise InputError(f"{path}.detail and the item's own detail are both given; give one")
        chosen["detail"] = fields["detail"]
    return fields["url"]


def _parse_grounding(kind: Any, item: Mapping[str, Any], path: str) -> GroundingPart:
    refuse_unknown(item, {"type", kind, "picture"}, path)
    count, image_number = _NUM_COORDINATES[kind], item.get("picture")
    numbers = _parse_coordinates(item.get(kind))
    if len(numbers) != count:
        raise InputError(
            f"{path}.{kind} must be {count} numbers in pixels, got {abbreviate(item.get(kind))}"
        )
    if kind == "box" and (numbers[0] > numbers[2] or numbers[1] > numbers[3]):
        raise InputError(
            f"{path}.box is {list(numbers)}: x2 and y2 must not be smaller than x1 and y1"
        )
    if image_number is not None and not _is_image_number(image_number):
        raise InputError(
            f"{path}.picture is {abbreviate(image_number)}; images are numbered from 1"
        )
    return GroundingPart(kind, numbers, image_number, path)


def _is_image_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _parse_coordinates(raw: Any) -> tuple[float, ...]:
    """Parse [x, y, ...] or [[x, y], ...]; return () for anything else."""
    if not isinstance(raw, list | tuple):
        return ()
    flat = [n for entry in raw for n in (entry if isinstance(entry, list | tuple) else [entry])]
    numbers = all(isinstance(n, Real) and not isinstance(n, bool) for n in flat)
    return tuple(flat) if numbers and all(abs(n) < _MAX_COORDINATE for n in flat) else ()


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
