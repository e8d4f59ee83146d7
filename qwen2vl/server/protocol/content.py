"""Messages in the OpenAPI description, and the options that a request gives for all its media.

The processor validates messages (`parse_messages`) and accepts more than OpenAI's format, so their
JSON schema is written by hand here and pydantic checks their number only. `MediaFields` are the
request's options; an item of the content may have its own, which win. `ChatTemplateFields` are for
requests that have messages and go through the chat template. (vLLM: mm_processor_kwargs,
media_io_kwargs.)
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from qwen2vl.errors import InputError
from qwen2vl.processor.media_options import MediaOptions
from qwen2vl.server.protocol.sampling import RequestModel, Unsupported, invalid_field

__all__ = [
    "MAX_CONTENT_ITEMS",
    "MAX_MESSAGES",
    "ChatTemplateFields",
    "MediaFields",
    "MessageList",
    "check_num_items",
]

MAX_MESSAGES = 512
MAX_CONTENT_ITEMS = 2048  # content items and tool calls of a request: each costs 20 us
_MAX_PIXELS = 100_000_000
_MAX_FRAMES = 100_000
_MAX_FPS = 1_000_000

_TEMPLATE_SWITCHES = ("enable_thinking", "thinking", "add_vision_id")

_PIXELS = {"type": "integer", "minimum": 1, "maximum": _MAX_PIXELS}
_SECONDS = {"type": "number", "minimum": 0}
_FRAMES = {"type": "integer", "minimum": 1, "maximum": _MAX_FRAMES}
_IMAGE_OPTIONS: dict[str, Any] = {
    "min_pixels": _PIXELS,
    "max_pixels": _PIXELS,
    "detail": {"enum": ["low", "high", "auto", "original"]},
}
_VIDEO_OPTIONS: dict[str, Any] = {
    **_IMAGE_OPTIONS,
    "fps": {"type": "number", "exclusiveMinimum": 0, "maximum": _MAX_FPS},
    "num_frames": _FRAMES,
    "min_frames": _FRAMES,
    "max_frames": _FRAMES,
    "video_start": _SECONDS,
    "video_end": _SECONDS,
}
_URL = {
    "type": "string",
    "description": "data: URL; http(s) and file URLs only where the server allows them.",
}


def _item(kind: str, properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one kind of content item; the first property is required."""
    return {
        "type": "object",
        "title": kind,
        "properties": {"type": {"const": kind}, **properties},
        "required": ["type", next(iter(properties))],
        "additionalProperties": False,
    }


def _source(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of {"url": ...}, or the URL alone."""
    nested = {
        "type": "object",
        "properties": {"url": _URL, **properties},
        "required": ["url"],
        "additionalProperties": False,
    }
    return {"anyOf": [nested, _URL]}


_FRAME_LIST = {"type": "array", "items": _URL, "minItems": 1, "description": "One URL a frame."}
_DETAIL = {"detail": _IMAGE_OPTIONS["detail"]}
_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "oneOf": [
                    _item("text", {"text": {"type": "string"}}),
                    _item("image_url", {"image_url": _source(_DETAIL), **_IMAGE_OPTIONS}),
                    _item("image", {"image": _URL, **_IMAGE_OPTIONS}),
                    _item("video_url", {"video_url": _source({}), **_VIDEO_OPTIONS}),
                    _item("video", {"video": {"anyOf": [_URL, _FRAME_LIST]}, **_VIDEO_OPTIONS}),
                ]
            },
        },
    ]
}
_TOOL_CALL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
            "required": ["name", "arguments"],
        },
    },
    "required": ["function"],
}
_MESSAGE: dict[str, Any] = {
    "type": "object",
    "title": "Message",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": _CONTENT,
        "name": {"type": "string", "description": "Accepted and ignored."},
        "tool_calls": {"type": "array", "items": _TOOL_CALL, "description": "Of an assistant."},
        "tool_call_id": {"type": "string", "description": "Of a tool's result."},
    },
    "required": ["role"],
}


def check_num_items(messages: list[Any]) -> list[Any]:
    """Refuse messages of too many content items, before each of them is parsed."""
    count = sum(
        len(value)
        for message in messages
        if isinstance(message, dict)
        for key in ("content", "output", "tool_calls")  # output: of the Responses API
        if isinstance(value := message.get(key), list)
    )
    if count > MAX_CONTENT_ITEMS:
        raise InputError(
            f"the messages have {count:,} content items and tool calls, the limit is "
            f"{MAX_CONTENT_ITEMS:,}; join texts"
        )
    return messages


MessageList = Annotated[
    list[Any],
    Field(min_length=1, max_length=MAX_MESSAGES),
    AfterValidator(check_num_items),
    WithJsonSchema({"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": MAX_MESSAGES}),
]

_PixelCount = Annotated[int, Field(ge=1, le=_MAX_PIXELS)]
_FrameCount = Annotated[int, Field(ge=1, le=_MAX_FRAMES)]
_FrameRate = Annotated[float, Field(gt=0, le=_MAX_FPS)]


class PixelSize(RequestModel):
    """Areas, under the names of the official preprocessor_config.json."""

    shortest_edge: _PixelCount | None = Field(default=None, description="min_pixels")
    longest_edge: _PixelCount | None = Field(default=None, description="max_pixels")


class ProcessorOptions(RequestModel):
    """Options of preprocessing. (vLLM: mm_processor_kwargs.)"""

    min_pixels: _PixelCount | None = None
    max_pixels: _PixelCount | None = None
    fps: _FrameRate | None = None
    num_frames: _FrameCount | None = None
    size: PixelSize | None = None


class VideoOptions(RequestModel):
    """Options of reading videos."""

    fps: _FrameRate | None = None
    num_frames: Annotated[
        _FrameCount | None,
        BeforeValidator(lambda value: None if type(value) is int and value == -1 else value),
        WithJsonSchema({"anyOf": [_FRAMES, {"enum": [-1, None]}]}),
    ] = Field(default=None, description="-1: as without it, by the frame rate.")


class NoOptions(RequestModel):
    """Images are read without options."""


class MediaReadingOptions(RequestModel):
    """Options of reading media. (vLLM: media_io_kwargs.)"""

    image: NoOptions | None = None
    video: VideoOptions | None = None


class MediaFields(RequestModel):
    """Options for all media of a request that do not have their own."""

    min_pixels: _PixelCount | None = Field(
        default=None, description="Least pixels of a resized image."
    )
    max_pixels: _PixelCount | None = Field(
        default=None, description="Most pixels of a resized image."
    )
    fps: _FrameRate | None = Field(default=None, description="Sampled frames per second of videos.")
    num_frames: _FrameCount | None = Field(
        default=None, description="Sampled frames of each video."
    )
    mm_processor_kwargs: ProcessorOptions | None = None
    media_io_kwargs: MediaReadingOptions | None = None

    def media_options(self) -> MediaOptions:
        """Return the options of the request, wherever they are given.

        Raises:
            InputError: one is given twice with different values, or two exclude each other.
        """
        processing = self.mm_processor_kwargs or ProcessorOptions()
        size = processing.size or PixelSize()
        reading = (self.media_io_kwargs or MediaReadingOptions()).video or VideoOptions()
        given: dict[str, tuple[Any, ...]] = {
            "min_pixels": (self.min_pixels, processing.min_pixels, size.shortest_edge),
            "max_pixels": (self.max_pixels, processing.max_pixels, size.longest_edge),
            "fps": (self.fps, processing.fps, reading.fps),
            "nframes": (self.num_frames, processing.num_frames, reading.num_frames),
        }
        chosen = {
            name: value for name, values in given.items() if (value := _single_value(name, values))
        }
        try:
            return MediaOptions(**chosen)
        except InputError as error:
            text = str(error).replace("nframes", "num_frames")
            raise InputError(text, param=text.partition(" ")[0]) from error


class TemplateArguments(Unsupported):
    """Annotation of the arguments of a chat template: only those that turn something off."""

    def __init__(self) -> None:
        super().__init__(
            "the chat template has no arguments but enable_thinking, thinking and add_vision_id, "
            "which must be false; leave it out",
            {},
            {"enable_thinking": False},
        )

    def check(self, value: Any) -> Any:
        """Return arguments that have no effect; refuse others."""
        is_neutral = isinstance(value, dict) and all(
            name in _TEMPLATE_SWITCHES and (one is False or one is None)
            for name, one in value.items()
        )
        if value is None or is_neutral:
            return value
        raise InputError(self.reason)


class ChatTemplateFields(MediaFields):
    """How the prompt of a conversation ends; templates are those of the model."""

    add_generation_prompt: bool | None = Field(
        default=None, description="End with the header of the assistant's answer; the default."
    )
    continue_final_message: bool | None = Field(
        default=None, description="Continue the last message, which is the assistant's."
    )
    chat_template: Annotated[Any, Unsupported("templates of clients are not run; leave it out")] = (
        None
    )
    chat_template_kwargs: Annotated[Any, TemplateArguments()] = None

    @property
    def adds_generation_prompt(self) -> bool:
        """Whether the prompt ends with the header of the assistant's answer."""
        return self.add_generation_prompt is not False and not self.continue_final_message

    def check_chat_template(self) -> None:
        """Refuse a last message that is to be continued and followed by another.

        Raises:
            InputError: names the field, in `param` as well.
        """
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid_field(
                "continue_final_message", "excludes add_generation_prompt; set either to false"
            )


def _single_value(name: str, values: tuple[Any, ...]) -> Any:
    """Return the only value among those given, or None."""
    found = {value for value in values if value is not None}
    if len(found) > 1:
        name = "num_frames" if name == "nframes" else name
        low, high = sorted(found)[:2]
        text = f"{name} is given twice, as {low} and {high}; give it once"
        raise InputError(text, param=name)
    return found.pop() if found else None
