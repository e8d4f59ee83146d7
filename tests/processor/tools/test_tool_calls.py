"""Parser of tool calls in a whole output."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.processor.content import TextPart
from qwen2vl.processor.messages import ToolCall, parse_messages
from qwen2vl.processor.tools import ParsedReply, merge_turns, parse_tool_calls
from tests.processor.tools.recorded_streams import STREAMS, RecordedStream

STAR = "\u273f"
FUNCTION, ARGS, RESULT, RETURN = (
    f"{STAR}{w}{STAR}" for w in ("FUNCTION", "ARGS", "RESULT", "RETURN")
)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Just words.", ParsedReply("Just words.")),
        (": Going on.", ParsedReply("Going on.")),  # after RETURN, the output begins with the colon
        (
            f"I tap.\n{FUNCTION}: Tap\n{ARGS}: {{\"point\": (348,291)}}\n",
            ParsedReply("I tap.", (ToolCall("Tap", '{"point": (348,291)}'),)),
        ),
        (f": \n{FUNCTION}: Home\n{ARGS}: {{}}", ParsedReply("", (ToolCall("Home", "{}"),))),
        (
            f"{FUNCTION}: f\n{ARGS}: {{\"a\": 1}}\n{FUNCTION}: g\n{ARGS}: {{}}\n{RESULT}",
            ParsedReply("", (ToolCall("f", '{"a": 1}'), ToolCall("g", "{}"))),
        ),
        (f"{FUNCTION}: f\n{ARGS}: {{}} }} <!-- so -->", ParsedReply("", (ToolCall("f", "{}"),))),
        (
            f"{FUNCTION}: f\n{ARGS}: {{}}\n{RESULT}: lie\n{RETURN}: x",
            ParsedReply("", (ToolCall("f", "{}"),)),
        ),
        (f"{FUNCTION}: f", ParsedReply("", (ToolCall("f", ""),))),
        (f"{FUNCTION}: f\n{ARGS}: not json", ParsedReply("", (ToolCall("f", "not json"),))),
        (f"Words\n{STAR}FUNC", ParsedReply("Words")),
        (f"Words\n{STAR}", ParsedReply("Words")),
        (f"A flower {STAR} here", ParsedReply(f"A flower {STAR} here")),
        (f"{ARGS}: {{}} and {FUNCTION}", ParsedReply(f"{ARGS}: {{}} and")),
        (f"Words {RESULT}: lie\n{FUNCTION}: f\n", ParsedReply("Words")),
        (f"{FUNCTION} f {ARGS} {{}}", ParsedReply("", (ToolCall("f", "{}"),))),
        (
            f"{FUNCTION}: f\n{FUNCTION}: g\n{ARGS}:\n",
            ParsedReply("", (ToolCall("f", ""), ToolCall("g", ""))),
        ),
        (
            f"{FUNCTION}: f\n{ARGS}: {{\"a\": \"}}\n{RETURN}",
            ParsedReply("", (ToolCall("f", '{"a": "}'),)),
        ),
        ("", ParsedReply("")),
    ],
)  # fmt: skip
def test_tool_calls_are_parsed(text: str, want: ParsedReply) -> None:
    assert parse_tool_calls(text) == want


names = st.text("abcXYZ_0189", min_size=1, max_size=9)
arguments = st.dictionaries(st.text('ab{}"\\ ', max_size=4), st.integers(), max_size=3)


@given(st.lists(st.tuples(names, arguments), max_size=3), st.text("abc .,:", max_size=12))
def test_rendered_calls_are_parsed_back(
    calls: list[tuple[str, dict[str, int]]], content: str
) -> None:
    content = content.strip().lstrip(":")
    message = {
        "role": "assistant",
        "content": content.strip(),
        "tool_calls": [{"name": n, "arguments": a} for n, a in calls],
    }
    (parsed,) = parse_messages([message])
    (turn,) = merge_turns([parsed])
    text = "".join(part.text for part in turn.parts if isinstance(part, TextPart))
    reply = parse_tool_calls(text)
    assert reply.tool_calls == parsed.tool_calls
    assert reply.text == content.strip()


@given(st.text(f"ab:\n {STAR}", max_size=30) | st.text(max_size=30))
def test_parser_accepts_any_text(text: str) -> None:
    reply = parse_tool_calls(text)
    assert len(reply.text) <= len(text)


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
def test_recorded_streams_are_parsed(stream: RecordedStream) -> None:
    assert parse_tool_calls(stream.text) == stream.reply


def test_colon_is_kept_where_no_result_is_before_it() -> None:
    assert parse_tool_calls(":) fine", after_result=False).text == ":) fine"
    assert parse_tool_calls(": fine").text == "fine"
