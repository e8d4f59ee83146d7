"""ShareGPT's format: turns with from and value, of LLaVA, LLaMA-Factory and ms-swift.

    {"conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": "..."}],
     "system": "...", "tools": "[...]", "image": "a.png"}

A row may also have role and content in place of from and value, or, as ms-swift, pairs of human and
assistant. Other keys of a turn are reported as unused, unless they change what it means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qwen2vl.data.formats.columns import Row
from qwen2vl.data.formats.messages import build_conversation, require_list
from qwen2vl.data.formats.samples import Conversation, SampleError

__all__ = ["parse_sharegpt"]

_ROLES = (
    "human",
    "user",
    "gpt",
    "assistant",
    "bot",
    "system",
    "tool",
    "observation",
    "function_call",
    "tool_call",
    "tool_response",
)
_USER_KEYS, _ASSISTANT_KEYS = ("human", "user"), ("assistant", "gpt", "bot")
# Keys that are passed on: read, or refused by name, as those of messages are.
_PASSED_KEYS = (
    *("loss", "weight", "tool_calls", "tool_call_id", "function_call"),
    *("reasoning_content", "reasoning", "thinking", "loss_scale", "audio", "image", "images"),
    *("video", "videos", "chosen", "rejected"),
)


def parse_sharegpt(value: Any, row: Row, name: str, key: str) -> Conversation:
    """Parse the turns of a row.

    Args:
        value: of the column.
        row: of the file.
        name: of the sample.
        key: the column's name.

    Raises:
        SampleError: a turn is malformed, or of an unknown role.
    """
    turns: list[Mapping[str, Any]] = []
    for i, turn in enumerate(require_list(value, key)):
        if not isinstance(turn, dict):
            raise SampleError("messages", f"{key}[{i}] is {turn!r:.40}, not an object")
        if _is_pair(turn):
            turns += _split_pair(turn, row, key)
        else:
            turns.append(_read_turn(turn, f"{key}[{i}]", row, key))
    return build_conversation(name, turns, row, key=key, needs_tags=True)


def _is_pair(turn: Mapping[str, Any]) -> bool:
    keys = turn.keys()
    return not keys.isdisjoint(_USER_KEYS) and not keys.isdisjoint(_ASSISTANT_KEYS)


def _split_pair(turn: Mapping[str, Any], row: Row, key: str) -> Iterator[Mapping[str, Any]]:
    """Yield the two messages of ms-swift's {"human": ..., "assistant": ...}."""
    question = next(name for name in _USER_KEYS if name in turn)
    answer = next(name for name in _ASSISTANT_KEYS if name in turn)
    for name in turn:
        if name not in (question, answer):
            row.add_unused(f"{key}.{name}")
    yield {"role": "user", "content": turn[question]}
    yield {"role": "assistant", "content": turn[answer]}


def _read_turn(turn: Mapping[str, Any], path: str, row: Row, key: str) -> Mapping[str, Any]:
    role_key = "from" if "from" in turn else "role"
    text_key = "value" if "value" in turn else "content"
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError(
            "messages", f"{path} is from {role!r:.40}; known are {', '.join(sorted(_ROLES))}"
        )
    message = {"role": role, "content": turn.get(text_key)}
    for name, value in turn.items() if len(turn) > len(message) else ():
        if name in _PASSED_KEYS:
            message[name] = value
        elif name not in (role_key, text_key):
            row.add_unused(f"{key}.{name}")
    return message
