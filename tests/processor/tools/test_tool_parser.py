"""Streaming parser of tool calls: any split of an output gives what the whole output gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.processor.messages import ToolCall
from qwen2vl.processor.tools import (
    ArgumentsDelta,
    ParsedReply,
    TextDelta,
    ToolCallParser,
    ToolCallStart,
    ToolEvent,
    parse_tool_calls,
)
from tests.processor.tools.recorded_streams import STREAMS, A, F, RecordedStream

STAR = "\u273f"
# Pieces of which texts are made that are hard to parse.
PIECES = (
    *("\n", " ", ":", "{", "}", '"', "\\", "a", "{}", "(1,2)", "\r", "\u2028", "\x1c"),
    *(STAR, f"{STAR}FUN", f"{STAR}R", f"{STAR}RESULT{STAR}", f"{STAR}RETURN{STAR}", F, A),
    *(f'\n{F}: f\n{A}: {{"x": "', f'{F}: g\n{A}: {{"x": 1}}\n'),
)
cases = pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)


def join(events: Iterable[ToolEvent]) -> ParsedReply:
    """Join events as a client does."""
    text = ""
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, TextDelta):
            assert event.text
            assert not calls
            text += event.text
        elif isinstance(event, ToolCallStart):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        else:
            assert event.text
            assert event.index == len(calls) - 1
            calls[-1][1] += event.text
    return ParsedReply(text, tuple(ToolCall(name, arguments) for name, arguments in calls))


def parse(pieces: Sequence[str], **options: bool) -> ParsedReply:
    parser = ToolCallParser(**options)
    events = [event for piece in pieces for event in parser.feed(piece)]
    reply = join([*events, *parser.finish()])
    assert parser.num_calls == len(reply.tool_calls)
    assert parser.finish() == []
    return reply


@cases
def test_tokens_of_a_stream_join_to_the_whole(stream: RecordedStream) -> None:
    assert "".join(stream.pieces) == stream.text
    assert parse(stream.pieces) == stream.reply
    assert parse(list(stream.text)) == stream.reply


@cases
def test_every_split_in_two_and_three_joins_to_the_whole(stream: RecordedStream) -> None:
    text = stream.text
    for i in range(len(text) + 1):
        assert parse([text[:i], text[i:]]) == stream.reply
        for j in range(i, min(i + 12, len(text))):
            assert parse([text[:i], text[i:j], text[j:]]) == stream.reply


@given(st.sampled_from(STREAMS), st.lists(st.integers(0, 200), max_size=12))
def test_every_split_joins_to_the_whole(stream: RecordedStream, cuts: list[int]) -> None:
    ends = sorted(min(cut, len(stream.text)) for cut in cuts)
    pieces = [stream.text[i:j] for i, j in zip([0, *ends], [*ends, len(stream.text)], strict=True)]
    assert parse(pieces) == stream.reply


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14), st.booleans())
def test_any_text_is_parsed_as_by_the_reference(pieces: list[str], after_result: bool) -> None:
    text = "".join(pieces)
    want = parse_tool_calls(text, after_result=after_result)
    for split in (pieces, [text], list(text)):
        assert parse(split, after_result=after_result) == want


def test_text_is_not_held_back() -> None:
    parser = ToolCallParser()
    assert parser.feed("Hello,") == [TextDelta("Hello,")]
    assert parser.feed(" world \n") == [TextDelta(" world")]
    assert parser.feed(f"{STAR} and") == [TextDelta(f" \n{STAR} and")]


def test_name_and_arguments_are_told_at_once() -> None:
    parser = ToolCallParser()
    assert parser.feed(f"{F}: f\n") == [ToolCallStart(0, "f")]
    assert parser.feed(f'{A}: {{"a"') == [ArgumentsDelta(0, '{"a"')]
    assert parser.feed(": 1 ") == [ArgumentsDelta(0, ": 1")]
    assert parser.feed("} and more") == [ArgumentsDelta(0, " }")]
    assert parser.finish() == []


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_calls_beyond_the_limit_are_dropped(limit: int) -> None:
    stream = next(stream for stream in STREAMS if stream.name == "parallel calls")
    parser = ToolCallParser(max_calls=limit)
    events = [event for piece in stream.pieces for event in parser.feed(piece)]
    reply = join([*events, *parser.finish()])
    assert reply.tool_calls == stream.reply.tool_calls[:limit]


def test_several_arguments_of_a_name_count_as_calls() -> None:
    parser = ToolCallParser(max_calls=1)
    events = parser.feed(f'{F}: f\n{A}: {{"a": 1}}\n{A}: {{"a": 2}}\n') + parser.finish()
    assert join(events).tool_calls == (ToolCall("f", '{"a": 1}'),)


def test_long_output_takes_linear_time() -> None:
    parser = ToolCallParser()
    for _ in range(50_000):  # quadratic time would take minutes
        parser.feed(" ")
    parser.feed(f"{F}: f\n{A}: {{")
    for _ in range(50_000):
        parser.feed("\n{")
    assert len(join(parser.finish()).tool_calls) == 0
    assert parser.num_calls == 1
