"""ShareGPT's turns: keys that are passed on, pairs, and unknown roles."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.formats.prepared import error_of, learned, parse, prepare

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_from_and_value_are_read_in_either_column(key: str) -> None:
    expected = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert parse({key: TURNS}).messages == expected


def test_loss_and_weight_of_a_turn_are_obeyed() -> None:
    more = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[0], {"from": "bot", "value": "b", "loss": 1}]
    assert learned(prepare(parse({"conversations": more}))) == ["b<|im_end|>"]


@pytest.mark.parametrize(
    ("turn", "error"),
    [
        (
            {"from": "gpt", "value": "a", "thinking": "hm"},
            "messages[1].thinking cannot be used: the chat",
        ),
        (
            {"from": "gpt", "value": "a", "loss_scale": 2},
            "conversations[1] has an unknown key 'loss_scale'",
        ),
        ({"from": "robot", "value": "a"}, "conversations[1] is from 'robot'; known are assistant,"),
        ({"from": "function_call", "value": "f()"}, "conversations[1]: the tool call is not JSON"),
    ],
)
def test_keys_and_roles_that_cannot_be_used_are_refused(turn: Any, error: str) -> None:
    assert error in error_of({"conversations": [TURNS[0], turn]})


def test_pairs_of_a_row_name_their_other_keys() -> None:
    sample = parse({"conversation": [{"human": "q", "assistant": "a", "lang": "en"}]})
    assert [message["content"] for message in sample.messages] == ["q", "a"]
    assert sample.unused == ("conversation.lang",)
