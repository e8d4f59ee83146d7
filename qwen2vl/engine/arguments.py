"""One or many: what the doors of the LLM take, made into lists of equal length.

It must not know what a message holds; the processor checks that. Next room: llm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from qwen2vl.engine.params import SamplingParams
from qwen2vl.errors import InputError

__all__ = ["Conversation", "as_batch", "is_unfinished", "one_each"]

Conversation = SequenceOf[Mapping[str, Any]]


def as_batch(conversations: Conversation | SequenceOf[Conversation]) -> list[Conversation]:
    """Tell one conversation (its first element is a message) from a list of them.

    Raises:
        InputError: neither; what its messages are is for the processor to check.
    """
    if not isinstance(conversations, SequenceOf) or isinstance(conversations, str):
        raise InputError(
            "conversations: expected a list of messages or a list of such lists, got "
            f"{type(conversations).__name__}; wrap text as "
            '[{"role": "user", "content": text}]'
        )
    if conversations and isinstance(conversations[0], Mapping):
        return [conversations]  # type: ignore[list-item]
    return list(conversations)  # type: ignore[arg-type]


def is_unfinished(conversation: Conversation) -> bool:
    """Tell whether the assistant has the last word; what is no message the processor names."""
    last = conversation[-1] if conversation else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def one_each(
    params: SamplingParams | SequenceOf[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Give each of `count` prompts its params.

    Raises:
        InputError: there are more or fewer, or something else among them.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InputError(f"params: got {len(params)} for {count} prompts; give one, or one each")
    strange = [type(wish).__name__ for wish in params if not isinstance(wish, SamplingParams)]
    if strange:
        raise InputError(f"params: got {strange[0]}, must be SamplingParams, one or one each")
    return list(params)
