"""Conversations and prompts as arguments of the Python API: accepted forms, and their validation.

A conversation is given as a text with images and videos, as one message or as a list of messages,
in which {"type": "image"} alone is the placeholder of the next image; a list of any of these is a
batch. A prompt is text, a dict in vLLM's form, or a ModelInput. Messages and media are validated by
the processor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard, get_args

from qwen2vl.engine.validation import PreparedRequest
from qwen2vl.errors import CapacityError, InputError, abbreviate, copy_error
from qwen2vl.processor.chat_template import MODALITY_OF
from qwen2vl.processor.content import Modality, parse_media_item, read_mapping
from qwen2vl.processor.inputs import ModelInput

__all__ = [
    "NOT_GIVEN",
    "Batch",
    "Conversation",
    "ConversationForm",
    "PromptForm",
    "TextPrompt",
    "as_batch",
    "as_conversation",
    "as_prepared",
    "as_prompts",
    "ends_with_assistant",
    "is_list",
    "naming",
]

Conversation = Sequence[Mapping[str, Any]]
ConversationForm = str | Mapping[str, Any] | Conversation
PromptForm = str | ModelInput | Mapping[str, Any]
# A default, so that a call without a conversation gets to the check of its other names.
NOT_GIVEN: Any = None

_PLACEHOLDER = re.compile("|".join(map(re.escape, MODALITY_OF)))
_MESSAGE = '({"role": ..., "content": ...})'


# Conversations ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """The conversations of a call."""

    conversations: list[Conversation]
    is_list: bool  # given as a list, so that errors name the index

    def naming(self, index: int) -> AbstractContextManager[None]:
        """Return a context in which errors name the conversation of this index."""
        return naming(f"conversations[{index}]" if self.is_list else "")


def as_batch(
    conversations: ConversationForm | Sequence[ConversationForm],
    images: Any = None,
    videos: Any = None,
) -> Batch:
    """Normalize one conversation, or a list of them.

    Raises:
        InputError: the argument is neither. Messages are validated by the processor.
    """
    if not is_list(conversations) or (conversations and _is_message(conversations[0])):
        one = as_conversation(conversations, images, videos, name="conversations")
        return Batch([one], is_list=False)
    for name, media in (("images", images), ("videos", videos)):
        if media is not None:
            raise InputError(
                f"{name}: got {abbreviate(media)} for a list of conversations; put them into the "
                f'messages, as {{"{name[:-1]}": ...}} in a content'
            )
    normal: list[Conversation] = []
    for index, form in enumerate(conversations):
        if _is_message(form):
            raise InputError(
                f"conversations[{index}]: got a message among conversations; make it a "
                "conversation, a list with this one message"
            )
        normal.append(as_conversation(form, name=f"conversations[{index}]"))
    return Batch(normal, is_list=True)


def as_conversation(
    form: Any, images: Any = None, videos: Any = None, *, name: str = "conversation"
) -> Conversation:
    """Normalize one conversation to its list of messages.

    `images` and `videos` come before a text; in messages they replace the placeholders, in order.

    Raises:
        InputError: it has none of the three forms, or images go with messages without placeholders.
    """
    images, videos = _media_items("image", images), _media_items("video", videos)
    if isinstance(form, str):
        media = [*images, *videos]
        content = [*media, {"type": "text", "text": form}] if media else form
        return [{"role": "user", "content": content}]
    if _is_message(form):
        form = [form]
    if not is_list(form):
        raise InputError(
            f"{name}: got {abbreviate(form)}, must be a text, a message {_MESSAGE} or a list of "
            "messages"
        )
    if form and not _is_message(form[0]):
        remedy = "; stream takes one conversation, chat a list" if name == "conversation" else ""
        raise InputError(
            f"{name}[0]: got {abbreviate(form[0])} in a list of messages, must be a message "
            f"{_MESSAGE}{remedy}"
        )
    if images:
        form = _fill_placeholders(form, "image", images)
    return _fill_placeholders(form, "video", videos) if videos else form


def _fill_placeholders(
    messages: Conversation, kind: Modality, items: Sequence[Mapping[str, Any]]
) -> Conversation:
    """Return the messages with each content item {"type": kind} replaced by the next of `items`."""
    placeholder = {"type": kind}
    remaining = iter(items)
    num_placeholders = 0
    filled: list[Mapping[str, Any]] = []
    for message in messages:
        fields = read_mapping(message) or {}
        content = fields.get("content")
        if is_list(content):
            is_open = [read_mapping(item) == placeholder for item in content]
            num_placeholders += sum(is_open)
            new = [next(remaining, item) if is_open[i] else item for i, item in enumerate(content)]
            message = {**fields, "content": new} if any(is_open) else message
        filled.append(message)
    if not num_placeholders:
        raise InputError(
            f'{kind}s: go with a text, got messages; put {{"{kind}": ...}} into the content of a '
            f'message, or the placeholder {{"type": "{kind}"}}'
        )
    if num_placeholders != len(items):
        raise InputError(
            f'{kind}s: got {len(items)} for {num_placeholders} placeholders {{"type": "{kind}"}} '
            "in the messages; each placeholder needs one"
        )
    return filled


def ends_with_assistant(conversation: Conversation) -> bool:
    """Whether the last message is an assistant's; the processor reports malformed messages."""
    last = conversation[-1] if conversation else None
    return (read_mapping(last) or {}).get("role") == "assistant"


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list of something: no text, and no bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _is_message(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is a message: a mapping, or an object that the processor converts to one."""
    return read_mapping(value) is not None


def _media_items(kind: Modality, given: Any) -> list[dict[str, Any]]:
    """Return the content items of one source, or of a list of sources or content items."""
    if given is None:
        return []
    items: list[dict[str, Any]] = []
    for index, source in enumerate(given if is_list(given) else [given]):
        parse_media_item(kind, source, f"{kind}s[{index}]")  # raises under this name
        item = read_mapping(source)
        items.append({"type": kind, **({kind: source} if item is None else item)})
    return items


# Prompts ----------------------------------------------------------------------------------------


class TextPrompt(NamedTuple):
    """Raw text, and the content items that its placeholders stand for, in order."""

    text: str
    media: Sequence[Mapping[str, Any]] = ()


def as_prompts(prompts: Any) -> list[TextPrompt | ModelInput]:
    """Normalize one prompt of `LLM.generate`, or a list of them.

    Raises:
        InputError: a prompt is neither text, nor a dict in vLLM's form, nor a ModelInput.
    """
    if not is_list(prompts):
        return [_as_prompt(prompts, "prompts")]
    return [_as_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]


def _as_prompt(prompt: Any, name: str) -> TextPrompt | ModelInput:
    if isinstance(prompt, ModelInput):
        return prompt
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
        raise InputError(
            f"{name}: prompt_token_ids cannot be given, since images need their text; give the "
            "text as prompt"
        )
    if isinstance(prompt, Mapping) and prompt.keys() <= {"prompt", "multi_modal_data"}:
        text, media = prompt.get("prompt"), prompt.get("multi_modal_data") or {}
        is_media = isinstance(media, Mapping) and media.keys() <= set(get_args(Modality))
        if isinstance(text, str) and is_media:
            with naming(name):
                return _in_order(text, media)
    raise InputError(
        f"{name}: got {abbreviate(prompt)}, must be text or a ModelInput of the processor, or "
        '{"prompt": TEXT, "multi_modal_data": {"image": ...}}; messages go to LLM.chat'
    )


def _in_order(text: str, media: Mapping[str, Any]) -> TextPrompt:
    """Order images and videos, each in a list of its own, by the placeholders in the text."""
    items = {kind: _media_items(kind, media.get(kind)) for kind in get_args(Modality)}
    kinds = [MODALITY_OF[token] for token in _PLACEHOLDER.findall(text)]
    ordered = [items[kind].pop(0) for kind in kinds if items[kind]]
    return TextPrompt(text, [*ordered, *items["image"], *items["video"]])


def as_prepared(prepared: Any) -> Sequence[PreparedRequest]:
    """Normalize one result of `LLM.prepare`, or a list of them.

    Raises:
        InputError: an element is anything else.
    """
    if isinstance(prepared, PreparedRequest):
        return [prepared]
    if is_list(prepared) and all(isinstance(one, PreparedRequest) for one in prepared):
        return prepared
    raise InputError(
        f"prepared: got {abbreviate(prepared)}, must be what LLM.prepare returned, or a list of "
        "such results"
    )


@contextmanager
def naming(prefix: str) -> Iterator[None]:
    """Put `prefix` before the errors of what a caller gave; nothing if it is empty."""
    try:
        yield
    except (InputError, CapacityError) as error:
        if not prefix:
            raise
        raise copy_error(error, f"{prefix}: ") from error
