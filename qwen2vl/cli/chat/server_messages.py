"""Messages of a chat session in OpenAI's format, as a server takes them.

Files and bytes become data URLs; http and https URLs are sent as they are, and the server decides.
Options of an image or video (fps, max_pixels, ...) are keys of its content part, as vLLM and
`qwen2vl serve` know them. No torch is imported.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2vl.cli import terminal
from qwen2vl.cli.chat.backend import ChatMessage, MediaSummary
from qwen2vl.cli.media_arguments import MediaFile, latest_media

if TYPE_CHECKING:
    from qwen2vl.processor.content import MediaPart, Modality, Part
    from qwen2vl.processor.media.source import Media
    from qwen2vl.processor.messages import Message

__all__ = ["ShownMedia", "describe_media", "latest_shown_media", "to_openai_messages"]

MAX_SENT_BYTES = 512_000_000  # of one file; a server's own limit is lower
UNKNOWN_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownMedia:
    """An image or video as this machine sees it, for boxes in pixels."""

    kind: Modality
    name: str
    original_size: tuple[int, int]  # (height, width) in pixels, with EXIF orientation applied


def to_openai_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Convert messages to OpenAI's format.

    Raises:
        InputError: a message is invalid, or a file cannot be read.
    """
    from qwen2vl.processor.messages import parse_messages

    return [_convert_message(message) for message in parse_messages(list(messages))]


def describe_media(messages: Sequence[ChatMessage]) -> MediaSummary:
    """Return size and bytes of the images and videos of messages, by their headers.

    Raises:
        InputError: a message is invalid, or a file cannot be read.
    """
    from qwen2vl.processor.content import MediaPart
    from qwen2vl.processor.messages import parse_messages

    lines: list[str] = []
    total = 0
    for message in parse_messages(list(messages)):
        for part in message.parts:
            if isinstance(part, MediaPart):
                line, num_bytes = _describe_part(part)
                lines.append(line)
                total += num_bytes
    return MediaSummary(lines=tuple(lines), total=_format_bytes(total))


def latest_shown_media(
    messages: Sequence[ChatMessage],
) -> tuple[list[MediaFile], list[ShownMedia]]:
    """Return the media of the last message that has any, and their sizes.

    No sizes are returned if one of them is not known: a URL, which only the server opens, or a
    list of frames.
    """
    files, _ = latest_media(list(messages))
    shown = [_shown_media(file, f"{file.kind} {number}") for number, file in enumerate(files, 1)]
    known = [media for media in shown if media is not None]
    return files, known if len(known) == len(shown) else []


# One message ------------------------------------------------------------------------------------


def _convert_message(message: Message) -> dict[str, Any]:
    from qwen2vl.processor.content import TextPart

    parts = message.parts
    converted: dict[str, Any] = {"role": message.role}
    if all(isinstance(part, TextPart) for part in parts):
        converted["content"] = "".join(p.text for p in parts if isinstance(p, TextPart))
    else:
        converted["content"] = [_convert_part(part) for part in parts]
    if message.tool_calls:
        converted["tool_calls"] = [
            {
                "id": call.id or f"call_{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for number, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        converted["tool_call_id"] = message.tool_call_id
    return converted


def _convert_part(part: Part) -> dict[str, Any]:
    from qwen2vl.processor.content import MediaPart, TextPart

    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, MediaPart):
        return _convert_media(part)
    picture = {} if part.image_number is None else {"picture": part.image_number}
    return {"type": part.kind, part.kind: list(part.numbers), **picture}


def _convert_media(part: MediaPart) -> dict[str, Any]:
    options: dict[str, Any] = part.options.to_dict()
    if isinstance(part.source, list | tuple):
        frames = [_to_url(frame, "image", f"frame {n}") for n, frame in enumerate(part.source, 1)]
        return {"type": part.kind, part.kind: frames, **options}
    url: dict[str, Any] = {"url": _to_url(part.source, part.kind, _name_of(part.source, part.kind))}
    if part.options.detail is not None:
        url["detail"] = part.options.detail
    key = f"{part.kind}_url"
    return {"type": key, key: url, **options}


def _to_url(source: Any, kind: Modality, name: str) -> str:
    """Return a source as a data URL; an http or https URL unchanged."""
    if _is_remote(source):
        return source
    media = _read_media(source, name)
    content = media.content.read_bytes() if isinstance(media.content, Path) else media.content
    assert isinstance(content, bytes), "messages of a chat hold files, bytes and URLs"
    media_type = _media_type(media, kind)
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _read_media(source: Any, name: str) -> Media:
    from qwen2vl.processor.media.source import MediaLimits, read_source

    return read_source(source, MediaLimits(max_bytes=MAX_SENT_BYTES), name)


def _media_type(media: Media, kind: Modality) -> str:
    """Return the media type of an encoded file; of an unknown one, what it was given as."""
    from qwen2vl.processor.media.sniff import sniff_type
    from qwen2vl.processor.media.source import read_head

    found = sniff_type(read_head(media))
    if found == UNKNOWN_TYPE:  # MPEG-TS has no magic bytes
        return "video/mp2t" if kind == "video" else "image/png"
    return found


def _is_remote(source: Any) -> bool:
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def _name_of(source: Any, default: str) -> str:
    is_path = isinstance(source, str) and not source.lower().startswith("data:")
    return os.path.basename(source) or default if is_path else default


# Sizes ------------------------------------------------------------------------------------------


def _describe_part(part: MediaPart) -> tuple[str, int]:
    """Return the line that describes an image or video, and its number of bytes."""
    if isinstance(part.source, list | tuple):
        return f"video of {len(part.source)} frames", 0
    name = _name_of(part.source, part.kind)
    if _is_remote(part.source):
        return f"{name}, opened by the server", 0
    media = _read_media(part.source, name)
    content = media.content
    num_bytes = content.stat().st_size if isinstance(content, Path) else _length(content)
    shown = _shown_media(MediaFile(kind=part.kind, source=part.source), name)
    size = f" {terminal.format_size(shown.original_size)}" if shown else ""
    return f"{name}{size}, {_format_bytes(num_bytes)}", num_bytes


def _format_bytes(num_bytes: int) -> str:
    if num_bytes >= 1_000_000:
        return terminal.format_bytes(num_bytes)
    return f"{-(-num_bytes // 1000)} kB"


def _length(content: Any) -> int:
    return len(content) if isinstance(content, bytes) else 0


def _shown_media(file: MediaFile, default_name: str) -> ShownMedia | None:
    """Read the size of an image or video from its header; None if only the server opens it."""
    from qwen2vl.processor.media.rgb import open_encoded, oriented_size
    from qwen2vl.processor.media.source import DEFAULT_LIMITS

    source: Any = file.source
    if _is_remote(source) or (isinstance(source, list | tuple) and any(map(_is_remote, source))):
        return None
    name = _name_of(source, default_name)
    if file.kind == "video":
        size = _video_size(source, name)
    else:
        with open_encoded(_read_media(source, name), DEFAULT_LIMITS, name) as (image, _):
            size = oriented_size(image)
    return ShownMedia(kind=file.kind, name=name, original_size=size)


def _video_size(source: Any, name: str) -> tuple[int, int]:
    """Return (height, width) of a video file, an animation or a list of frames."""
    from qwen2vl.processor.media.source import DEFAULT_LIMITS
    from qwen2vl.processor.media.video_source import open_video

    reader = open_video(source, DEFAULT_LIMITS, name, fps=1.0, apply_exif_orientation=True)
    try:
        return reader.metadata.height, reader.metadata.width
    finally:
        reader.close()
