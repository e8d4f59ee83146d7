"""One conversation or many, one SamplingParams or one each."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.validation import as_batch, is_unfinished, one_each
from qwen2vl.errors import InputError

ONE: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


def test_one_conversation_is_a_batch_of_one() -> None:
    assert as_batch(ONE) == [ONE]
    assert as_batch([ONE, ONE]) == [ONE, ONE]
    assert as_batch([]) == []


def test_text_is_no_conversation() -> None:
    with pytest.raises(InputError, match=r"expected a list of messages.*got str; wrap text as"):
        as_batch("Hi")  # type: ignore[arg-type]


def test_params_are_for_all_or_one_each() -> None:
    short, long = SamplingParams(max_tokens=1), SamplingParams(max_tokens=9)
    assert one_each(None, 2) == [SamplingParams()] * 2
    assert one_each(short, 2) == [short, short]
    assert one_each([short, long], 2) == [short, long]
    with pytest.raises(InputError, match="got 1 for 2 prompts"):
        one_each([short], 2)


def test_who_has_the_last_word() -> None:
    assert is_unfinished([*ONE, {"role": "assistant", "content": "He"}])
    assert not is_unfinished(ONE)
    assert not is_unfinished([])
