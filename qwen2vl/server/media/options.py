"""Options of media that a request gives for all of its images and videos.

An item's own options win; `with_media_defaults` fills in what it leaves out. (vLLM:
mm_processor_kwargs, media_io_kwargs.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qwen2vl.errors import InputError, copy_error
from qwen2vl.processor.content import MediaPart, Part
from qwen2vl.processor.media_options import NO_OPTIONS, MediaOptions
from qwen2vl.processor.messages import Message

__all__ = ["with_media_defaults"]


def with_media_defaults(messages: Sequence[Message], defaults: MediaOptions) -> list[Message]:
    """Return the messages with options filled in where an image or video leaves them out.

    Images take min_pixels and max_pixels only. An item's own option wins over one that it
    excludes: detail "low" over max_pixels, nframes over fps.

    Raises:
        InputError: the two together contradict each other; `param` is the item's path.
    """
    if defaults == NO_OPTIONS:
        return list(messages)
    return [
        replace(message, parts=tuple(_with_defaults(part, defaults) for part in message.parts))
        if any(isinstance(part, MediaPart) for part in message.parts)
        else message
        for message in messages
    ]


# Option -> options of the same item that exclude it.
_EXCLUDED_BY = {
    "min_pixels": ("resized_height",),
    "max_pixels": ("resized_height", "detail"),
    "fps": ("nframes",),
    "nframes": ("fps",),
}


def _with_defaults(part: Part, defaults: MediaOptions) -> Part:
    if not isinstance(part, MediaPart):
        return part
    names = ["min_pixels", "max_pixels"] if part.kind == "image" else list(_EXCLUDED_BY)
    filled = {
        name: value
        for name in names
        if (value := getattr(defaults, name)) is not None
        and getattr(part.options, name) is None
        and not any(_excludes(part.options, other) for other in _EXCLUDED_BY[name])
    }
    try:
        return replace(part, options=replace(part.options, **filled))
    except InputError as error:
        copied = copy_error(error, f"{part.path}: ")
        copied.param = part.path
        raise copied from error


def _excludes(options: MediaOptions, name: str) -> bool:
    value = getattr(options, name)
    return value == "low" if name == "detail" else value is not None
