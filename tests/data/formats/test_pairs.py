"""Questions and answers in columns: how they are joined, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.formats.prepared import error_of, learned, parse, prepare


@pytest.mark.parametrize(("given", "question"), [("x", "do\nx"), ("", "do"), (None, "do")])
def test_instruction_and_input_are_joined_by_a_line_break(given: Any, question: str) -> None:
    row = {"instruction": "do", "input": given, "output": "done"}
    assert [message["content"] for message in parse(row).messages] == [question, "done"]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"query": "q", "response": ["a", "b"]}, "response is ['a', 'b']; it must be text"),
        ({"query": "q", "response": "a", "history": "[[1]]"}, "history is '[[1]]'; it must be a"),
        ({"query": "q", "response": "a", "history": [["b"]]}, "history[0] is ['b']; it must be"),
        ({"prompt": [], "completion": [{"role": "assistant", "content": "a"}]}, "prompt is []"),
        ({"prompt": "q"}, "the row has the keys prompt, and none of messages"),
        ({"instruction": "q"}, "the row has the keys instruction, and none of"),
    ],
)
def test_malformed_columns_are_refused(row: dict[str, Any], error: str) -> None:
    assert error in error_of(row)


def test_of_prompt_and_completion_only_the_completion_is_learned() -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    row = {"prompt": [user, assistant, user], "completion": [assistant, user, assistant]}
    assert learned(prepare(parse(row))) == ["a<|im_end|>"] * 2
    assert learned(prepare(parse({**row, "prompt": [user]}))) == ["a<|im_end|>"] * 2


def test_tags_of_questions_use_the_media_else_they_precede_the_first() -> None:
    pairs = [{"user": "one", "assistant": "1"}, {"user": "two <image>", "assistant": "2"}]
    tagged = parse({"texts": pairs, "images": ["a"]}).messages
    assert [m["content"] for m in tagged[:2]] == ["one", "1"]
    assert tagged[2]["content"][1] == {"type": "image", "image": "a"}
    untagged = parse({"texts": pairs[:1], "images": ["a"]}).messages
    assert untagged[0]["content"][0] == {"type": "image", "image": "a"}
