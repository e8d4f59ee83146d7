"""Normalization of arguments: one or many conversations, one or many SamplingParams."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.validation import as_batch, broadcast_params, ends_with_assistant
from qwen2vl.errors import InputError

CONVERSATION: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


def test_one_conversation_is_a_batch_of_one() -> None:
    assert as_batch(CONVERSATION) == [CONVERSATION]
    assert as_batch([CONVERSATION, CONVERSATION]) == [CONVERSATION, CONVERSATION]
    assert as_batch([]) == []


def test_text_is_not_a_conversation() -> None:
    with pytest.raises(InputError, match=r"expected a list of messages.*got str; wrap text as"):
        as_batch("Hi")  # type: ignore[arg-type]


def test_params_are_broadcast_or_given_for_each_prompt() -> None:
    short, long = SamplingParams(max_tokens=1), SamplingParams(max_tokens=9)
    assert broadcast_params(None, 2) == [SamplingParams()] * 2
    assert broadcast_params(short, 2) == [short, short]
    assert broadcast_params([short, long], 2) == [short, long]
    with pytest.raises(InputError, match="got 1 for 2 prompts"):
        broadcast_params([short], 2)


def test_ends_with_assistant() -> None:
    assert ends_with_assistant([*CONVERSATION, {"role": "assistant", "content": "He"}])
    assert not ends_with_assistant(CONVERSATION)
    assert not ends_with_assistant([])
