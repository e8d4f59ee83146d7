"""Messages of a row: loss and weight, reasoning, tool calls and results in the names of others."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.data.validation_split import sample_digest
from qwen2vl.errors import InputError
from qwen2vl.processor.messages import parse_messages
from tests.data.formats.prepared import error_of, learned, parse, prepare

END = "<|im_end|>"


def chat(*turns: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": role, "content": f"x{i}", **keys} for i, (role, keys) in enumerate(turns)
        ]
    }


@pytest.mark.parametrize("key", ["loss", "weight"])
@pytest.mark.parametrize("nothing", [None, False, 0, 0.0])
def test_messages_are_learned_as_loss_and_weight_say(key: str, nothing: Any) -> None:
    row = chat(
        ("system", {key: nothing}),
        ("user", {key: nothing}),
        ("assistant", {key: False}),
        ("user", {}),
        ("assistant", {key: 1}),
        ("user", {}),
        ("assistant", {key: None}),
    )
    plain = {"messages": [{k: v for k, v in m.items() if k != key} for m in row["messages"]]}
    prepared = prepare(parse(row))
    assert learned(prepared) == [f"x4{END}", f"x6{END}"]
    assert prepared.input_ids == prepare(parse(plain)).input_ids
    assert learned(prepare(parse(plain))) == [f"x2{END}", f"x4{END}", f"x6{END}"]
    assert sample_digest(parse(row)) != sample_digest(parse(plain))


@pytest.mark.parametrize(
    ("role", "keys", "error"),
    [
        ("assistant", {"weight": 0.5}, "messages[1].weight is 0.5, must be 0 or 1"),
        ("assistant", {"loss": "no"}, "messages[1].loss is 'no', must be true or false"),
        ("assistant", {"loss": 2}, "messages[1].loss is 2, must be true or false"),
        ("assistant", {"loss": True, "weight": 0}, "a loss and a weight that contradict"),
        ("user", {"loss": True}, "only messages of the assistant are learned, and its role is"),
        ("tool", {"weight": 1}, "messages[1].weight is 1, but only messages of the assistant"),
        ("assistant", {"loss_scale": 0.3}, "messages[1] has an unknown key 'loss_scale'"),
        ("assistant", {"reasoning_content": "hm"}, "reasoning_content cannot be used: the chat"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(
    role: str, keys: dict[str, Any], error: str
) -> None:
    assert error in error_of(chat(("user", {}), (role, keys), ("assistant", {})))


def test_known_roles_and_keys_are_those_of_training() -> None:
    error = error_of({"messages": [{"role": "agent", "content": "q"}]})
    assert "messages[0].role is 'agent'; known roles: system, user, assistant, tool, " in error
    for role in ("tool_call", "tool_response", "function_call", "observation", "human", "gpt"):
        assert role in error
    error = error_of({"messages": [{"role": "assistant", "content": "a", "loss_scale": 0.5}]})
    assert "'loss_scale'; what is learned is said by loss (true or false) or weight" in error


def test_a_conversation_whose_answers_are_all_context_is_bad() -> None:
    row = chat(("user", {}), ("assistant", {"loss": False}))
    assert error_of(row) == "answer: there is no answer to learn from"


def test_empty_reasoning_is_nothing() -> None:
    row = chat(("user", {}), ("assistant", {"reasoning_content": "", "thinking": None}))
    assert learned(prepare(parse(row))) == [f"x1{END}"]


def test_inference_still_refuses_loss_and_weight() -> None:
    for key in ("loss", "weight"):
        with pytest.raises(InputError, match=rf"messages\[0\] has an unknown key '{key}'"):
            parse_messages([{"role": "assistant", "content": "x", key: True}])


CALL = '{"name": "f", "arguments": {"a": 1}}'


def tool_row(**keys: Any) -> dict[str, Any]:
    row = chat(
        ("user", {}),
        ("assistant", {**keys}),
        ("tool_call", {"content": CALL, **keys}),
        ("tool_response", {}),
        ("assistant", {}),
    )
    return row


def test_a_tool_call_that_is_context_is_not_learned_nor_is_its_keyword() -> None:
    spans = learned(prepare(parse(tool_row())))
    assert [span.replace("\u273f", "*") for span in spans] == [
        'x1\n*FUNCTION*: f\n*ARGS*: {"a": 1}\n*RESULT*',
        f": x4{END}",
    ]
    assert learned(prepare(parse(tool_row(loss=False)))) == [f": x4{END}"]
    last = tool_row()
    last["messages"][-1]["loss"] = False
    assert learned(prepare(parse(last))) == spans[:1]


def test_consecutive_calls_are_parallel_calls_of_one_message() -> None:
    row = chat(
        ("user", {}),
        ("function_call", {"content": CALL}),
        ("function_call", {"content": f"[{CALL}, {CALL}]"}),
        ("observation", {}),
        ("assistant", {}),
    )
    messages = parse(row).messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert len(messages[1]["tool_calls"]) == 3
    row["messages"][2]["loss"] = False
    assert "are one turn, and only one of them is to be learned" in error_of(row)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("f(1)", "messages[1]: the tool call is not JSON"),
        ("[]", "a tool call must be"),
        ('{"arguments": {}}', "a tool call must be"),
        ('{"name": "f", "more": 1}', "messages[1].tool_calls[0] has an unknown key 'more'"),
    ],
)
def test_malformed_tool_calls_are_refused(content: str, error: str) -> None:
    row = chat(("user", {}), ("function_call", {"content": content}))
    assert error in error_of(row)


@pytest.mark.parametrize("tag", ["<image>", "<image_placeholder>"])
def test_tags_in_arguments_are_refused_in_rows_with_media(tag: str) -> None:
    arguments = f'{{"name": "f", "arguments": {{"a": "{tag}"}}}}'
    row = chat(("user", {}), ("function_call", {"content": arguments}))
    assert parse(row)
    error = error_of({**row, "images": []})
    assert f" have {tag}" in error or f" the placeholder {tag}" in error


def test_calls_before_a_call_must_be_a_list() -> None:
    call = ("tool_call", {"content": '{"name": "f"}'})
    row = chat(("user", {}), ("assistant", {"tool_calls": 5}), call)
    assert "messages[1].tool_calls is 5; give a list" in error_of(row)


def test_tools_may_have_the_old_name() -> None:
    row = {**chat(("user", {}), ("assistant", {})), "functions": [{"name": "f"}]}
    assert parse(row).tools == [{"name": "f"}]
    assert parse({**row, "tools": [{"name": "g"}]}).unused == ("functions",)


@pytest.mark.parametrize("content", ["", "  \n", [], [{"type": "text", "text": " "}]])
def test_an_empty_answer_is_noted_where_it_is_learned(content: Any) -> None:
    row = chat(("user", {}), ("assistant", {"content": content}))
    assert parse(row).notes == ("an empty answer, of which only <|im_end|> is learned",)
    row["messages"][1]["loss"] = False
    assert parse(row).notes == ()
    assert parse(chat(("user", {}), ("assistant", {}))).notes == ()
    assert len(parse({"prompt": "a", "completion": " "}).notes) == 1
    assert parse({"prompt": "a", "completion": "b"}).notes == ()


def test_an_answer_of_an_item_or_a_call_is_not_empty() -> None:
    box = chat(("user", {}), ("assistant", {"content": [{"type": "box", "box": [1, 2, 30, 40]}]}))
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    call = chat(("user", {}), ("assistant", {"content": "", "tool_calls": calls}))
    assert parse(box).notes == parse(call).notes == ()
