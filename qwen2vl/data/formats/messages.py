"""Messages of a row: roles, supervision and tools, in the names of any framework.

    {"role": "assistant", "content": "...", "loss": false}    ms-swift: not learned
    {"role": "assistant", "content": "...", "weight": 0}      OpenAI: not learned
    {"role": "tool_call", "content": "{...}"}                 LLaMA-Factory: function_call
    {"role": "tool_response", "content": "..."}               LLaMA-Factory: observation

What is left is a conversation that `parse_messages` reads: its unknown keys are refused there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2vl.data.formats.columns import Row
from qwen2vl.data.formats.contents import fill_contents
from qwen2vl.data.formats.samples import Conversation, SampleError
from qwen2vl.errors import abbreviate

__all__ = ["build_conversation", "require_list"]

RawMessage = Mapping[str, Any]

_CALL_ROLES = ("function_call", "tool_call")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    **dict.fromkeys(_CALL_ROLES, "assistant"),
    "observation": "tool",
    "tool_response": "tool",
}
_SUPERVISION_KEYS = ("loss", "weight")  # ms-swift's and OpenAI's name
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # refused, unless empty


@dataclass(frozen=True, slots=True)
class _Message:
    """A message with the keys that `parse_messages` knows, and whether it is learned."""

    fields: RawMessage
    is_supervised: bool
    is_call: bool = False  # of a role for tool calls


def build_conversation(
    name: str,
    turns: Sequence[Any],
    row: Row,
    *,
    key: str,
    num_context: int = 0,
    always_tagged: bool = False,
) -> Conversation:
    """Build the conversation of a row.

    Args:
        name: of the sample.
        turns: its messages, each with role and content, in the names of any framework.
        row: of the file, for its media, objects, tools and system prompt.
        key: of the column that the messages are from, for errors.
        num_context: messages at the start that are a prompt: nothing of them is learned.
        always_tagged: tags are placeholders in rows without media, too, and media need a tag each.

    Raises:
        SampleError: a message is malformed, or media or objects do not match their tags.
    """
    messages = [
        _read_message(turn, f"{key}[{i}]", is_context=i < num_context)
        for i, turn in enumerate(turns)
    ]
    messages = _merge_calls(messages, key)
    system = row.peek("system")
    if isinstance(system, str) and system and messages[0].fields.get("role") != "system":
        row.take("system")  # a system message overrides the column, which is then unused
        messages.insert(0, _Message({"role": "system", "content": system}, is_supervised=True))
    filled = fill_contents([message.fields for message in messages], row, always_tagged)
    return Conversation(
        name,
        filled,
        _read_tools(row),
        unsupervised=tuple(
            i
            for i, message in enumerate(messages)
            if message.fields.get("role") == "assistant" and not message.is_supervised
        ),
    )


def require_list(value: Any, key: str) -> list[Any]:
    """Return the turns of a conversation.

    Raises:
        SampleError: it is no list, or an empty one.
    """
    if not isinstance(value, list) or not value:
        raise SampleError("messages", f"{key} is {value!r:.40}; it must be a list with turns")
    return value


# Roles and supervision --------------------------------------------------------------------------


def _read_message(raw: Any, path: str, *, is_context: bool) -> _Message:
    if not isinstance(raw, Mapping):
        raise SampleError("messages", f"a message is {raw!r:.40}, not an object")
    given = raw.get("role")
    role = _ROLES.get(given, given) if isinstance(given, str) else given
    left_out = {*_SUPERVISION_KEYS, *(key for key in _REASONING_KEYS if raw.get(key) == "")}
    fields = {key: value for key, value in raw.items() if key not in left_out}
    if "role" in fields:
        fields["role"] = role
    is_supervised = _read_supervision(raw, role, path) and not is_context
    if given not in _CALL_ROLES:
        return _Message(fields, is_supervised)
    fields["tool_calls"] = _parse_calls(fields.pop("content", None), path)
    return _Message(fields, is_supervised, is_call=True)


def _read_supervision(raw: RawMessage, role: Any, path: str) -> bool:
    """Return whether a message is learned, by the keys of ms-swift and OpenAI."""
    values = {}
    for key in _SUPERVISION_KEYS:
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            wanted = "true or false" if key == "loss" else "0 or 1"
            raise SampleError("messages", f"{path}.{key} is {abbreviate(value)}, must be {wanted}")
        values[key] = bool(value)
        if value and role != "assistant":
            raise SampleError(
                "messages",
                f"{path}.{key} is {abbreviate(value)}, but only messages of the assistant are "
                f"learned, and its role is {abbreviate(role)}",
            )
    if len(set(values.values())) > 1:
        raise SampleError("messages", f"{path} has a loss and a weight that contradict each other")
    return all(values.values())


def _parse_calls(content: Any, path: str) -> list[Any]:
    """Parse the content of a message of tool calls: JSON of one call, or of a list of them."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise SampleError(
            "messages", f"{path}: the tool call is not JSON: {error}; it is {content!r:.40}"
        ) from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and call.get("name") for call in calls):
        raise SampleError(
            "messages",
            f'{path}: a tool call must be {{"name": ..., "arguments": ...}}, or a list of them, '
            f"got {abbreviate(content)}",
        )
    return calls


def _merge_calls(messages: Sequence[_Message], key: str) -> list[_Message]:
    """Append tool calls to the assistant's message before them, which they are part of."""
    merged: list[_Message] = []
    for i, message in enumerate(messages):
        if not message.is_call or not merged or merged[-1].fields.get("role") != "assistant":
            merged.append(message)
            continue
        last = merged[-1]
        if last.is_supervised != message.is_supervised:
            raise SampleError(
                "messages",
                f"{key}[{i}] and the assistant's message before it are one turn, and only one of "
                "them is to be learned",
            )
        calls = [*(last.fields.get("tool_calls") or ()), *message.fields["tool_calls"]]
        fields = {**last.fields, "tool_calls": calls}
        merged[-1] = _Message(fields, last.is_supervised, last.is_call)
    return merged


def _read_tools(row: Row) -> Any:
    """Parse the tool definitions, which some files store as a JSON string."""
    key = "functions" if row.peek("tools") is None else "tools"  # OpenAI's old name
    value = row.take(key)
    try:
        parsed = json.loads(value.strip() or "null") if isinstance(value, str) else value
    except ValueError as error:
        raise SampleError("messages", f"{key} is not JSON: {error}") from error
    if not parsed:
        return None
    if not isinstance(parsed, list) or not all(isinstance(tool, Mapping) for tool in parsed):
        raise SampleError("messages", f"{key} is {parsed!r:.40}; it must be a list of objects")
    return parsed
