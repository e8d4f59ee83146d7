"""Recorded tool calls through both APIs and OpenAI's client: any split gives the same answer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openai import LengthFinishReasonError, OpenAI

from qwen2vl.processor.tools import ParsedReply
from tests.processor.tools.recorded_streams import STREAMS, RecordedStream
from tests.server.conftest import ServerStarter
from tests.server.serving.scripted import scripted

cases = pytest.mark.parametrize("recorded", STREAMS, ids=lambda stream: stream.name)
Replay = Callable[..., OpenAI]

NAMES = ("get_weather", "get_time", "tap", "search", "note")
FUNCTIONS: list[Any] = [{"name": name, "parameters": {"type": "object"}} for name in NAMES]
CHAT: dict[str, Any] = {
    "model": "nano",
    "tools": [{"type": "function", "function": function} for function in FUNCTIONS],
}
RESPONSES: dict[str, Any] = {
    "model": "nano",
    "tools": [{"type": "function", **function} for function in FUNCTIONS],
}
QUESTION: Any = {"role": "user", "content": "Do it."}
CALL = {"id": "c", "type": "function", "function": {"name": "tap", "arguments": "{}"}}


@pytest.fixture
def replay(start_server: ServerStarter) -> Iterator[Replay]:
    """Give a function: `replay(["a", "b"])` is a client of a server that answers so."""
    live = start_server()
    clients: list[OpenAI] = []

    def connect(pieces: list[str], **options: Any) -> OpenAI:
        live.state.engine = scripted(live.state, pieces or [""], **options).engine
        clients.append(OpenAI(base_url=f"{live.base_url}/v1", api_key="none", max_retries=0))
        return clients[-1]

    engine = live.state.engine
    yield connect
    live.state.engine = engine
    for client in clients:
        client.close()


def splits(recorded: RecordedStream) -> list[list[str]]:
    """Return the tokens of a stream, its characters, the whole, and two random splits."""
    rng = random.Random(recorded.text)
    text = recorded.text
    found = [recorded.pieces, list(text), [text]]
    for _ in range(2):
        ends = sorted(rng.choices(range(len(text) + 1), k=4))
        found.append([text[i:j] for i, j in zip([0, *ends], [*ends, len(text)], strict=True)])
    return found


def messages_before(recorded: RecordedStream) -> list[Any]:
    """Return a conversation that a stream may answer: some follow a tool's result."""
    if not recorded.text.startswith(":"):
        return [QUESTION]
    result = {"role": "tool", "content": "done", "tool_call_id": "c"}
    return [QUESTION, {"role": "assistant", "tool_calls": [CALL]}, result]


def items_before(recorded: RecordedStream) -> list[Any]:
    if not recorded.text.startswith(":"):
        return [QUESTION]
    call = {"type": "function_call", "call_id": "c", "name": "tap", "arguments": "{}"}
    return [QUESTION, call, {"type": "function_call_output", "call_id": "c", "output": "done"}]


def reply_of_message(message: Any) -> tuple[str, list[tuple[str, str]]]:
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    assert len({call.id for call in message.tool_calls or ()}) == len(calls)
    return message.content or "", calls


def reply_of_items(output: Any) -> tuple[str, list[tuple[str, str]]]:
    texts = [item.content[0].text for item in output if item.type == "message"]
    calls = [(item.name, item.arguments) for item in output if item.type == "function_call"]
    assert len({item.id for item in output}) == len(output) >= 1
    assert len(texts) <= 1
    return "".join(texts), calls


def wanted(reply: ParsedReply) -> tuple[str, list[tuple[str, str]]]:
    return reply.text, [(call.name, call.arguments) for call in reply.tool_calls]


def finish_of(recorded: RecordedStream) -> str:
    has_calls = recorded.finish_reason == "stop" and recorded.reply.tool_calls
    return "tool_calls" if has_calls else recorded.finish_reason


@cases
def test_chat_completions(replay: Replay, recorded: RecordedStream) -> None:
    request = {**CHAT, "messages": messages_before(recorded)}
    client = replay([recorded.text], finish_reason=recorded.finish_reason)
    whole = client.chat.completions.create(**request).choices[0]
    assert reply_of_message(whole.message) == wanted(recorded.reply)
    assert whole.finish_reason == finish_of(recorded)
    for pieces in splits(recorded):
        client = replay(pieces, finish_reason=recorded.finish_reason)
        with client.chat.completions.stream(**request) as stream:
            try:
                for _ in stream:
                    pass
                choice = stream.get_final_completion().choices[0]
            except LengthFinishReasonError as error:
                choice = error.completion.choices[0]
        assert reply_of_message(choice.message) == wanted(recorded.reply)
        assert choice.finish_reason == finish_of(recorded)


@cases
def test_responses(replay: Replay, recorded: RecordedStream) -> None:
    request = {**RESPONSES, "input": items_before(recorded)}
    status = "completed" if recorded.finish_reason == "stop" else "incomplete"
    client = replay([recorded.text], finish_reason=recorded.finish_reason)
    whole = client.responses.create(**request)
    assert reply_of_items(whole.output) == wanted(recorded.reply)
    assert whole.status == status
    for pieces in splits(recorded):
        client = replay(pieces, finish_reason=recorded.finish_reason)
        with client.responses.stream(**request) as stream:
            events = list(stream)
            if status == "completed":
                assert reply_of_items(stream.get_final_response().output) == wanted(recorded.reply)
        check_events(events)
        last: Any = events[-1]
        assert last.type == f"response.{status}"
        assert reply_of_items(last.response.output) == wanted(recorded.reply)
        assert last.response.output[-1].status == status
        assert [item.type for item in last.response.output] == [item.type for item in whole.output]


def check_events(events: list[Any]) -> None:
    """Check the order of events, their numbers, and that deltas join to what is done."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.status == "in_progress"
    assert events[0].response.output == []
    output = events[-1].response.output
    position = 2
    for index, item in enumerate(output):
        of_item = [event for event in events[2:-1] if event.output_index == index]
        assert events[position : position + len(of_item)] == of_item  # one item after the other
        position += len(of_item)
        kinds = [event.type.removeprefix("response.") for event in of_item]
        assert kinds[0] == "output_item.added"
        assert kinds[-1] == "output_item.done"
        assert of_item[-1].item.id == of_item[0].item.id == item.id
        ids = {event.item_id for event in of_item[1:-1]}
        assert ids <= {item.id}
        if item.type == "message":
            check_text(kinds, of_item, item.content[0].text)
        else:
            check_arguments(kinds, of_item, item.arguments)
    assert position == len(events) - 1


def check_text(kinds: list[str], events: list[Any], text: str) -> None:
    assert kinds[1] == "content_part.added"
    assert kinds[-3:-1] == ["output_text.done", "content_part.done"]
    assert set(kinds[2:-3]) <= {"output_text.delta"}
    assert "".join(event.delta for event in events[2:-3]) == text
    assert events[-3].text == events[-2].part.text == events[-1].item.content[0].text == text


def check_arguments(kinds: list[str], events: list[Any], arguments: str) -> None:
    assert kinds[-2] == "function_call_arguments.done"
    assert set(kinds[1:-2]) <= {"function_call_arguments.delta"}
    assert "".join(event.delta for event in events[1:-2]) == arguments
    assert events[-2].arguments == events[-1].item.arguments == arguments
    assert events[0].item.arguments == ""


@pytest.mark.parametrize("is_parallel", [True, False, None])
def test_parallel_calls_can_be_turned_off(replay: Replay, is_parallel: Any) -> None:
    recorded = next(stream for stream in STREAMS if stream.name == "parallel calls")
    wanted_calls = wanted(recorded.reply)[1][: 1 if is_parallel is False else 3]
    client = replay(recorded.pieces)
    chat = client.chat.completions.create(
        **CHAT, messages=[QUESTION], parallel_tool_calls=is_parallel
    )
    assert reply_of_message(chat.choices[0].message)[1] == wanted_calls
    response = client.responses.create(**RESPONSES, input="Do it.", parallel_tool_calls=is_parallel)
    assert reply_of_items(response.output)[1] == wanted_calls
    with client.responses.stream(
        **RESPONSES, input="Do it.", parallel_tool_calls=is_parallel
    ) as stream:
        assert reply_of_items(stream.get_final_response().output)[1] == wanted_calls


def test_events_are_named_as_their_types(replay: Replay) -> None:
    client = replay(["Hello"])
    with client.responses.with_streaming_response.create(
        model="nano", input="Hi", stream=True
    ) as raw:
        lines = [line for line in raw.iter_lines() if line]
    assert raw.headers["content-type"].startswith("text/event-stream")
    names = [line.removeprefix("event: ") for line in lines[::2]]
    data = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == [event["type"] for event in data]
    assert names[-1] == "response.completed"
