"""Parsing of messages in the three formats; errors name the path of the item."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.errors import InputError
from qwen2vl.processor.content import MediaPart, TextPart
from qwen2vl.processor.media_options import NO_OPTIONS
from qwen2vl.processor.messages import Message, ToolCall, parse_messages
from tests.processor.test_content import Dumped

CALL = {"name": "f", "arguments": "{}"}


def test_string_content_is_one_text_part_and_an_empty_one_is_none() -> None:
    assert parse_messages([{"role": "user", "content": "hi"}]) == [
        Message("user", (TextPart("hi"),), "messages[0]")
    ]
    assert parse_messages([{"role": "system", "content": ""}])[0].parts == ()


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_every_role_may_hold_media(role: str) -> None:
    (message,) = parse_messages([{"role": role, "content": [{"image": "a.png"}]}])
    assert message.parts == (MediaPart("image", "a.png", NO_OPTIONS, "messages[0].content[0]"),)


def test_tool_calls_of_an_assistant() -> None:
    (message,) = parse_messages(
        [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                    {"function": {"name": "g", "arguments": {"x": "\u4f60"}}},
                    {"name": "h", "arguments": None},
                ],
                "refusal": None,
            }
        ]
    )
    assert message.parts == ()
    assert message.tool_calls == (
        ToolCall("f", "{}", "c1"),
        ToolCall("g", '{"x": "\u4f60"}'),
        ToolCall("h", "{}"),
    )


def test_tool_results_have_a_tool_call_id() -> None:
    message = {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"}
    assert parse_messages([message])[0].tool_call_id == "c1"


# OpenAI ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (  # ChatCompletionMessage
            {
                "role": "assistant",
                "content": "hi",
                "refusal": None,
                "annotations": [],
                "audio": None,
                "function_call": None,
                "tool_calls": None,
            },
            Message("assistant", (TextPart("hi"),), "messages[0]"),
        ),
        (  # ParsedChatCompletionMessage: parsed repeats the content
            {"role": "assistant", "content": '{"x":1}', "parsed": {"x": 1}, "tool_calls": None},
            Message("assistant", (TextPart('{"x":1}'),), "messages[0]"),
        ),
        (  # its tool calls, some servers number them
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c", "type": "function", "index": 0, "function": CALL},
                    {"id": "d", "function": {**CALL, "parsed_arguments": {}}},
                ],
            },
            Message(
                "assistant", (), "messages[0]", (ToolCall("f", "{}", "c"), ToolCall("f", "{}", "d"))
            ),
        ),
        (  # before tool calls there was one function call
            {"role": "assistant", "content": None, "function_call": CALL},
            Message("assistant", (), "messages[0]", (ToolCall("f", "{}"),)),
        ),
        (
            {"role": "function", "name": "f", "content": "42"},
            Message("tool", (TextPart("42"),), "messages[0]"),
        ),
        (
            {"role": "assistant", "content": None, "refusal": "I cannot."},
            Message("assistant", (TextPart("I cannot."),), "messages[0]"),
        ),
        (
            {"role": "developer", "content": "Be brief.", "name": "d"},
            Message("system", (TextPart("Be brief."),), "messages[0]"),
        ),
        (
            {"role": "user", "content": "hi", "name": "ann"},
            Message("user", (TextPart("hi"),), "messages[0]"),
        ),
        (  # ResponseOutputMessage
            {
                "id": "m",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "phase": None,
                "content": [
                    {"type": "output_text", "text": "hi", "annotations": [], "logprobs": None}
                ],
            },
            Message("assistant", (TextPart("hi"),), "messages[0]"),
        ),
    ],
)
def test_messages_of_openai(raw: dict[str, Any], message: Message) -> None:
    assert parse_messages([raw]) == [message]
    assert parse_messages([Dumped(**raw)]) == [message]


def test_objects_inside_a_message() -> None:
    calls = [Dumped(id="c", type="function", function=Dumped(**CALL))]
    (message,) = parse_messages(
        [{"role": "assistant", "content": [Dumped(type="text", text="a")], "tool_calls": calls}]
    )
    assert message.parts == (TextPart("a"),)
    assert message.tool_calls == (ToolCall("f", "{}", "c"),)


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "messages is empty; give at least"),
        ("hello", r"messages must be a list of .*, got str"),
        ({"role": "user", "content": "hi"}, r"messages must be a list of .*, got dict"),
        (["hello"], r"messages\[0\] must be .*, got 'hello'"),
        ([object()], r"messages\[0\] must be .*, got <object object>$"),
        ([{"role": "user"}], r"messages\[0\]\.content is missing or null"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content is missing or null"),
        ([{"role": "user", "content": ""}], r"messages\[0\]\.content is empty; a user's turn"),
        ([{"role": "user", "content": []}], r"messages\[0\]\.content is empty; a user's turn"),
        ([{"role": "user", "content": 5}], r"content must be a string or a list of items, got int"),
        ([{"role": "user", "content": b"hi"}], r"must be a string or a list of items, got bytes"),
        ([{"role": "user", "content": {"text": "hi"}}], "a list of items, got dict"),
        ([{"role": "user", "content": ["hi"]}], r"messages\[0\]\.content\[0\] must be .*'hi'"),
        ([{"content": "hi"}], r"messages\[0\]\.role is None; known roles: system, user, assistant"),
        ([{"role": "robot", "content": "hi"}], r"messages\[0\]\.role is 'robot'; known roles"),
        ([{"role": ["user"], "content": "hi"}], r"messages\[0\]\.role is \['user'\]"),
        (
            [{"role": "user", "contents": "hi"}],
            r"messages\[0\] has an unknown key 'contents'; did you mean content\?",
        ),
        (
            [{"role": "user", "content": "hi", "tool_calls": []}],
            r"unknown key 'tool_calls'; known: content, name, role",
        ),
        ([{"role": "assistant", "tool_calls": "f()"}], r"tool_calls must be a list, got str"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"messages\[0\]\.tool_calls\[0\] must be"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}],
            r"messages\[0\]\.tool_calls\[0\]\.function must be",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "argumnts": "{}"}]}],
            r"tool_calls\[0\] has an unknown key 'argumnts'; did you mean arguments\?",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "why": ""}}]}],
            r"tool_calls\[0\]\.function has an unknown key 'why'; known: arguments, name",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}, "name": "g"}]}],
            r"tool_calls\[0\] has an unknown key 'name'; known: function, id, type",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}],
            r"tool_calls\[0\]\.type is 'custom'; only calls of type 'function'",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"id": 1, **CALL}]}],
            r"tool_calls\[0\]\.id must be a string, got int",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": b""}}]}],
            r"tool_calls\[0\]\.arguments cannot be written as JSON, got \{'x': b''\}; give the",
        ),
        (
            [{"role": "assistant", "tool_calls": [CALL], "function_call": CALL}],
            r"messages\[0\] has tool_calls and function_call; give tool_calls alone",
        ),
        (
            [{"role": "assistant", "function_call": {"arguments": ""}}],
            r"messages\[0\]\.function_call must be \{\"name\"",
        ),
        (
            [{"role": "assistant", "content": None, "audio": {"id": "a"}}],
            r"messages\[0\]\.audio cannot be used: audio is not supported; give a transcript",
        ),
        (
            [{"role": "assistant", "content": "a", "reasoning_content": "b"}],
            r"reasoning_content cannot be used: the chat template has no place for reasoning",
        ),
        ([{"role": "user", "content": "a", "refusal": "b"}], "unknown key 'refusal'; known: conte"),
        ([{"role": "tool", "content": "a", "tool_call_id": 1}], r"tool_call_id must be a string"),
        (
            [{"type": "function_call_output", "call_id": "c", "output": ""}],
            r"messages\[0\]\.type is 'function_call_output', must be \"message\"; give tool",
        ),
    ],
)
def test_message_errors_name_the_path(messages: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        parse_messages(messages)


def test_path_indexes_messages_and_items() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": [{"text": "a"}, {"text": 5}]},
    ]
    with pytest.raises(InputError, match=r"^messages\[2\]\.content\[1\]\.text must be"):
        parse_messages(messages)
