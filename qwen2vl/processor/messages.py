"""Parsing and validation of chat messages in three formats: Qwen, Hugging Face and OpenAI.

Messages are mappings or objects with `model_dump`, such as the ChatCompletionMessage that OpenAI's
client returns; their content items are parsed in content.py. Media are allowed in every role.
Unknown keys raise InputError with the path of the message. Keys without a meaning for the model
are ignored (docs/guides/ask.md lists them); no other key is. Nothing is rendered here.
(vLLM: parse_chat_messages.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2vl.errors import InputError, abbreviate
from qwen2vl.processor.content import (
    Part,
    TextPart,
    add_param,
    parse_content,
    read_mapping,
    refuse_unknown,
)

__all__ = ["ROLES", "Message", "ToolCall", "parse_messages"]

ROLES = ("system", "user", "assistant", "tool")


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
    is_supervised: bool = True  # of an assistant: whether training learns it (set by data/)


def parse_messages(messages: Sequence[Any]) -> list[Message]:
    """Parse and validate a conversation in any of the three formats.

    Messages that are parsed already are returned unchanged.

    Raises:
        InputError: something is missing, unknown or of the wrong type; the text names its path, and
            `param` is the path of the message or of its content item.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise _invalid_messages(
            'messages must be a list of {"role": ..., "content": ...}, got '
            f"{type(messages).__name__}"
        )
    if not messages:
        raise _invalid_messages('messages is empty; give at least {"role": "user", "content": ...}')
    return [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _invalid_messages(text: str) -> InputError:
    return InputError(text, param="messages")


_ROLE_OF = {"developer": "system", "function": "tool"}  # OpenAI's new and old names
_KEYS = {"role", "content", "name"}  # the template has no place for names
_KEYS_OF_ROLE = {
    "assistant": {"tool_calls", "function_call", "refusal"},
    "tool": {"tool_call_id"},
}
# These are about the message, or repeat its content; `grounding` is what a server of ours adds.
_IGNORED = {"id", "type", "status"}
_IGNORED_OF_ROLE = {"assistant": {"annotations", "grounding", "parsed", "phase"}}
_KEYS_OF_CALL = {"id", "type"}  # and "function", or the keys of the function itself
_KEYS_OF_FUNCTION = {"name", "arguments"}
_IGNORED_OF_CALL = {"index"}  # calls are in the order of their list
_IGNORED_OF_FUNCTION = {"parsed_arguments"}


def _parse_message(raw: Any, path: str) -> Message:
    if isinstance(raw, Message):
        return raw
    with add_param(path):
        return _parse_fields(raw, path)


def _parse_fields(raw: Any, path: str) -> Message:
    message = read_mapping(raw)
    if message is None:
        raise InputError(f'{path} must be {{"role": ..., "content": ...}}, got {abbreviate(raw)}')
    if message.get("type", "message") != "message":
        raise InputError(
            f'{path}.type is {abbreviate(message["type"])}, must be "message"; give tool calls as '
            "tool_calls of an assistant's message, and their results in the role tool"
        )
    role = _parse_role(message.get("role"), path)
    refuse_unknown(
        message,
        _KEYS | _KEYS_OF_ROLE.get(role, set()),
        path,
        _IGNORED | _IGNORED_OF_ROLE.get(role, set()),
    )
    tool_calls = tuple(_parse_tool_calls(message, path))
    refusal = _parse_string(message, "refusal", path)
    if "content" not in message and not tool_calls and not refusal:
        raise InputError(f"{path}.content is missing or null; give a string or a list of items")
    parts = tuple(parse_content(message.get("content", ""), f"{path}.content"))
    if role == "user" and not parts:
        raise InputError(f"{path}.content is empty; a user's turn needs text, an image or a video")
    if refusal:  # the assistant's text in place of an answer
        parts += (TextPart(refusal),)
    return Message(role, parts, path, tool_calls, _parse_string(message, "tool_call_id", path))


def _parse_role(role: Any, path: str) -> str:
    if not isinstance(role, str) or role not in (*ROLES, *_ROLE_OF):
        raise InputError(
            f"{path}.role is {abbreviate(role)}; known roles: {', '.join((*ROLES, *_ROLE_OF))}"
        )
    return _ROLE_OF.get(role, role)


def _parse_tool_calls(message: Mapping[str, Any], path: str) -> Iterable[ToolCall]:
    raw = message.get("tool_calls", ())
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes):
        raise InputError(f"{path}.tool_calls must be a list, got {type(raw).__name__}")
    for i, call in enumerate(raw):
        yield _parse_tool_call(call, f"{path}.tool_calls[{i}]")
    if "function_call" in message:
        if raw:
            raise InputError(f"{path} has tool_calls and function_call; give tool_calls alone")
        yield _parse_function(message["function_call"], f"{path}.function_call")


def _parse_tool_call(raw: Any, path: str) -> ToolCall:
    """Parse {"id": ..., "function": {"name": ..., "arguments": ...}}, or its function alone."""
    call = read_mapping(raw) or {}
    if call.get("type", "function") != "function":
        raise InputError(
            f"{path}.type is {abbreviate(call['type'])}; only calls of type 'function' can be given"
        )
    nested = "function" in call
    function = call["function"] if nested else call
    ignored = _IGNORED_OF_CALL | (set() if nested else _IGNORED_OF_FUNCTION)
    call_id = _parse_string(call, "id", path)
    if nested:
        parsed = _parse_function(function, f"{path}.function", call_id)
        refuse_unknown(call, {*_KEYS_OF_CALL, "function"}, path, ignored)
        return parsed
    flat = {key: value for key, value in call.items() if key not in _KEYS_OF_CALL | ignored}
    return _parse_function(flat, path, call_id)


def _parse_function(raw: Any, path: str, call_id: str | None = None) -> ToolCall:
    """Parse {"name": ..., "arguments": ...}."""
    function = read_mapping(raw)
    if function is None or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(
            f'{path} must be {{"name": ..., "arguments": ...}}, got {abbreviate(raw, 80)}'
        )
    refuse_unknown(function, _KEYS_OF_FUNCTION, path, _IGNORED_OF_FUNCTION)
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{path}.arguments cannot be written as JSON, got {abbreviate(arguments)}; give "
                "the JSON text"
            ) from error
    return ToolCall(function["name"], arguments, call_id)


def _parse_string(message: Mapping[str, Any], key: str, path: str) -> str | None:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{path}.{key} must be a string, got {type(value).__name__}")
    return value
