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
from typing import Any, NamedTuple

from qwen2vl.data.formats.columns import Row
from qwen2vl.data.formats.contents import fill_contents
from qwen2vl.data.formats.samples import Conversation, SampleError
from qwen2vl.errors import abbreviate
from qwen2vl.processor.messages import ROLES

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
_KNOWN_ROLES = (*ROLES, "developer", "function", *_ROLES)  # the two are OpenAI's
_SUPERVISION_KEYS = ("loss", "weight")  # ms-swift's and OpenAI's name
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # refused, unless empty
_OTHER_KEYS = (*_SUPERVISION_KEYS, *_REASONING_KEYS)  # that are not of `parse_messages`
_EMPTY_ANSWER = "an empty answer, of which only <|im_end|> is learned"


class _Message(NamedTuple):
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
    needs_tags: bool = False,
) -> Conversation:
    """Build the conversation of a row.

    Args:
        name: of the sample.
        turns: its messages, each with role and content, in the names of any framework.
        row: of the file, for its media, objects, tools and system prompt.
        key: of the column that the messages are from, for errors.
        num_context: messages at the start that are a prompt: nothing of them is learned.
        needs_tags: each medium needs a tag; else those of a row without tags precede its messages.

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
    filled = fill_contents([message.fields for message in messages], row, needs_tags)
    if any(message.is_supervised and _is_empty_answer(message.fields) for message in messages):
        row.add_note(_EMPTY_ANSWER)
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
    if not isinstance(raw, dict):
        raise SampleError("messages", f"{path} is {raw!r:.40}, not an object")
    given = raw.get("role")
    if isinstance(given, str) and given not in _KNOWN_ROLES:
        raise SampleError(
            "messages",
            f"{path}.role is {abbreviate(given)}; known roles: {', '.join(_KNOWN_ROLES)}",
        )
    if "loss_scale" in raw:
        raise SampleError(
            "messages",
            f"{path} has an unknown key 'loss_scale'; what is learned is said by loss (true or "
            "false) or weight (0 or 1)",
        )
    role = _ROLES.get(given, given) if isinstance(given, str) else given
    fields = {**raw, "role": role} if role is not given else {**raw}
    is_supervised = not is_context
    if not raw.keys().isdisjoint(_OTHER_KEYS):
        is_supervised = _read_supervision(raw, role, path) and is_supervised
        for key in _OTHER_KEYS:
            if key in _SUPERVISION_KEYS or raw.get(key) == "":
                fields.pop(key, None)
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


def _is_empty_answer(fields: RawMessage) -> bool:
    content = fields.get("content")
    if fields.get("role") != "assistant" or fields.get("tool_calls") or content is None:
        return False
    if isinstance(content, str):
        return not content.strip()
    return isinstance(content, list) and not any(
        not isinstance(item, dict) or str(item.get("text", "an image")).strip() for item in content
    )


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
        earlier = last.fields.get("tool_calls") or []
        if not isinstance(earlier, list):
            raise SampleError(
                "messages", f"{key}[{i - 1}].tool_calls is {abbreviate(earlier)}; give a list"
            )
        calls = [*earlier, *message.fields["tool_calls"]]
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
