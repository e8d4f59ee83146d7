"""Input items of the Responses API become messages, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.errors import InputError
from qwen2vl.processor.content import MediaPart, TextPart
from qwen2vl.processor.messages import ToolCall
from qwen2vl.server.serving.responses import parse_input
from tests.server.serving.test_responses import image, text, user

CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}


def test_items_become_messages() -> None:
    messages = parse_input(
        [
            {"role": "developer", "content": "Rules."},
            {"type": "message", "role": "user", "content": [text("Look."), image("red")]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "I call.", "annotations": [], "logprobs": []}
                ],
            },
            {**CALL, "id": "fc_1", "status": "completed"},
            {**CALL, "call_id": "c2", "arguments": '{"x": 1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
            {"type": "function_call_output", "call_id": "c2", "output": [image("blue")]},
        ],
        "Be brief.",
    )
    roles = ["system", "system", "user", "assistant", "tool", "tool"]
    assert [message.role for message in messages] == roles
    assert messages[0].parts == (TextPart("Be brief."),)
    assistant = messages[3]
    assert assistant.parts == (TextPart("I call."),)
    assert assistant.tool_calls == (
        ToolCall("look", "{}", "c1"),
        ToolCall("look", '{"x": 1}', "c2"),
    )
    assert [message.path for message in messages[1:]] == [f"input[{i}]" for i in (0, 1, 3, 6, 7)]
    pictures = [p for m in messages for p in m.parts if isinstance(p, MediaPart)]
    assert [part.path for part in pictures] == ["input[1].content[1]", "input[7].output[0]"]
    assert [message.tool_call_id for message in messages[4:]] == ["c1", "c2"]


def test_videos_have_a_type_of_their_own() -> None:
    video = {"type": "input_video", "video_url": "data:video/mp4;base64,AAAA", "fps": 1.0}
    (message,) = parse_input([user(video, text("What happens?"))])
    assert isinstance(message.parts[0], MediaPart)
    assert message.parts[0].kind == "video"
    assert message.parts[0].options.fps == 1.0


@pytest.mark.parametrize(
    ("given", "param", "reason"),
    [
        ("", "input", "is empty"),
        ([], "input", "is empty"),
        ([{"type": "reasoning", "summary": []}], "input", "is empty"),
        (3, "input", "got 3, must be a text or a list"),
        ([{"role": "user", "content": "x"}] * 1025, "input", "got 1,025 items, at most 1,024"),
        (["x"], "input[0]", "got 'x', must be an object"),
        ([{"type": "item_reference", "id": "m"}], "input[0].type", "nothing is stored"),
        ([{"type": "web_search_call"}], "input[0].type", "is 'web_search_call'; known: "),
        ([{"role": "user"}], "input[0]", "input[0].content is missing"),
        ([user({"type": "input_audio"})], "input[0]", "audio is not supported"),
        ([user({"type": "input_image", "file_id": "f"})], "input[0]", "cannot be used"),
        ([user({"type": "input_image"})], "input[0]", "input[0].content[0] needs one source"),
        ([{**CALL, "call_id": None}], "input[0].call_id", "is missing"),
        ([{"type": "function_call", "call_id": "c"}], "input[0]", "must be"),
        ([{**CALL, "output": "x"}], "input[0]", "unknown key 'output'"),
        (
            [{"type": "function_call_output", "call_id": "c"}],
            "input[0].output",
            "input[0].output: is missing",
        ),
        (
            [{"type": "function_call_output", "call_id": "c", "output": [{"type": "x"}]}],
            "input[0]",
            "input[0].output[0].type is 'x'",
        ),
    ],
)
def test_items_that_cannot_be_used_are_named(given: Any, param: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_input(given)
    assert reason in str(caught.value)
    assert (caught.value.param or "").startswith(param)
    assert "messages" not in str(caught.value)
