"""Streams of chat completions: joined, they are the response that is not streamed."""

from __future__ import annotations

import asyncio
import json
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from qwen2vl.errors import EngineError
from qwen2vl.server.errors import APIError
from qwen2vl.server.protocol.chat import ChatCompletionRequest, ChatDelta, ChunkChoice
from qwen2vl.server.serving.chat import create_chat_completion
from qwen2vl.server.serving.chat_stream import ChunkWriter, PreparedChat
from qwen2vl.server.serving.tool_choice import ToolPlan
from qwen2vl.server.state import Caller, ServerState
from tests.server.conftest import LiveServer, wait_until
from tests.server.serving.pictures import picture, question
from tests.server.serving.scripted import scripted
from tests.server.serving.test_chat import COLOR, HELLO, STAR, TOOL, client, handle

__all__ = ["client"]  # a fixture


class Weather(BaseModel):
    """Arguments of a tool."""

    city: Literal["Paris", "Rome"]


def stream(client: OpenAI, messages: Any, **options: Any) -> list[ChatCompletionChunk]:
    defaults = {"max_tokens": 24, "temperature": 0, "stream": True}
    return list(
        client.chat.completions.create(model="nano", messages=messages, **{**defaults, **options})
    )


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def read_all(state: ServerState, **body: Any) -> list[dict[str, Any]]:
    """Run the handler and return the chunks of its stream."""
    request = ChatCompletionRequest.model_validate({"messages": HELLO, "stream": True, **body})

    async def read() -> list[dict[str, Any]]:
        events: Any = await create_chat_completion(state, request, Caller("req-1"))
        return [json.loads(event) async for event in events]

    return asyncio.run(read())


def test_the_chunks_join_to_the_answer(client: OpenAI) -> None:
    options: Any = {"logprobs": True, "top_logprobs": 2}
    messages: Any = question(COLOR, picture("red"))
    whole = client.chat.completions.create(
        model="nano", messages=messages, max_tokens=24, temperature=0, **options
    )
    chunks = stream(client, messages, **options)
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].id.startswith("chatcmpl-")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert text_of(chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks][-1] == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    logprobs = [c.choices[0].logprobs for c in chunks]
    content = [one for found in logprobs if found for one in found.content or []]
    assert content == (whole.choices[0].logprobs and whole.choices[0].logprobs.content)
    assert all(chunk.usage is None for chunk in chunks)


def test_the_usage_comes_last(client: OpenAI) -> None:
    messages = question(COLOR, picture("blue"))
    chunks = stream(client, messages, stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    usage: Any = chunks[-1].usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.image_tokens == 16
    assert usage.media[0]["param"] == "messages[0].content[0]"


def test_the_usage_so_far(client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(client, question(COLOR, picture("red")), stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(counts) == len(chunks) and counts == sorted(counts)
    assert counts[-1] == counts[-2] == 4


def test_several_samples(client: OpenAI) -> None:
    options: Any = {"temperature": 8.0, "n": 3, "seed": 5, "max_tokens": 12}
    whole = client.chat.completions.create(model="nano", messages=HELLO, **options)
    chunks = stream(client, HELLO, **options)
    texts = [text_of(chunks, index) for index in range(3)]
    assert texts == [choice.message.content for choice in whole.choices]
    finished = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert sorted(finished) == [0, 1, 2]


def test_the_stop_reason_comes_with_the_finish_reason(client: OpenAI) -> None:
    chunks = stream(client, question(COLOR, picture("red")), stop="d")
    reasons: list[Any] = [(c.finish_reason, c.stop_reason) for x in chunks for c in x.choices]  # type: ignore[attr-defined]
    assert reasons[-1] == ("stop", "d")
    assert set(reasons[:-1]) == {(None, None)}


def test_the_clients_accumulator(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="nano",
        messages=HELLO,
        max_tokens=96,
        tools=[openai.pydantic_function_tool(Weather, name="get_weather")],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as events:
        names = [event.type for event in events]
        final = events.get_final_completion()
    assert "tool_calls.function.arguments.done" in names
    (choice,) = final.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.function.name == "get_weather" and call.id.startswith("call_")
    assert call.function.parsed_arguments.city in ("Paris", "Rome")  # type: ignore[union-attr]


@given(st.text(max_size=20), st.integers(0, 7))
def test_chunks_of_text_alone_are_written_as_others(
    server_state: ServerState, text: str, index: int
) -> None:
    body = ChatCompletionRequest.model_validate({"messages": HELLO})
    prepared: Any = SimpleNamespace(params=SimpleNamespace(n=1))
    writer = ChunkWriter(
        PreparedChat(
            body=body,
            model='na"no',
            plan=ToolPlan(),
            prepared=prepared,
            paths=[],
            tokenizer=server_state.engine.llm.processor.tokenizer,
            end_ids=frozenset(),
            began=0.0,
        )
    )
    choice = ChunkChoice(index=index, delta=ChatDelta(content=text))
    written = writer.dump_text(index, text)
    assert json.loads(written) == json.loads(writer.dump([choice], None))
    assert "\n" not in written and list(json.loads(written)) == list(
        json.loads(writer.dump([choice], None))
    )


# Tools ------------------------------------------------------------------------------------------

CALLS = (
    f'Let me see.\n{STAR}FUNCTION{STAR}: get_weather\n{STAR}ARGS{STAR}: {{"city": "R}}"}}\n'
    f'{STAR}FUNCTION{STAR}: get_weather\n{STAR}ARGS{STAR}: {{"city": "Paris"}}\n'
)


@pytest.mark.parametrize("seed", range(6))
def test_calls_in_any_pieces_join_to_the_response(server_state: ServerState, seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(CALLS)), seed * 6))
    edges = [0, *cuts, len(CALLS)]
    pieces = [CALLS[a:b] for a, b in pairwise(edges)]
    (whole,) = handle(scripted(server_state, CALLS), tools=[TOOL]).choices
    chunks = read_all(scripted(server_state, pieces), tools=[TOOL])
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == whole.message.content
    joined: dict[int, dict[str, str]] = {}
    for call in (call for delta in deltas for call in delta.get("tool_calls", [])):
        if call["index"] not in joined:
            assert call["type"] == "function" and call["id"].startswith("call_")
            joined[call["index"]] = {"name": call["function"]["name"], "arguments": ""}
        else:
            assert "id" not in call and "name" not in call["function"]
        joined[call["index"]]["arguments"] += call["function"]["arguments"]
    assert [joined[i] for i in sorted(joined)] == [
        {"name": call.function.name, "arguments": call.function.arguments}
        for call in whole.message.tool_calls
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


# Failures ---------------------------------------------------------------------------------------


def test_a_refusal_has_a_status(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        stream(client, HELLO, extra_body={"stop_token_ids": [999_999]})
    assert info.value.param == "stop_token_ids"


def test_a_failure_in_a_stream_is_its_last_event(server_state: ServerState) -> None:
    state = scripted(server_state, ["a", "b", "c"], errors={0: EngineError("secret")})
    request = ChatCompletionRequest.model_validate({"messages": HELLO, "stream": True})
    received: list[str] = []

    async def read() -> None:
        events: Any = await create_chat_completion(state, request, Caller("req-1"))
        async for event in events:
            received.append(event)

    with pytest.raises(APIError) as info:
        asyncio.run(read())
    assert info.value.status == 500 and "secret" not in info.value.message
    assert [json.loads(one)["choices"][0]["delta"].get("content") for one in received] == [
        "",
        "a",
        "b",
    ]
    assert state.engine.streams[0].is_aborted  # type: ignore[attr-defined]


def test_a_client_that_leaves_frees_the_request(client: OpenAI, live_server: LiveServer) -> None:
    (z,) = live_server.state.engine.llm.processor.tokenizer.encode_text("z")
    chunks = client.chat.completions.create(
        model="nano",
        messages=HELLO,
        stream=True,
        logit_bias={str(z): 100},
        max_tokens=3000,
    )
    next(iter(chunks))
    wait_until(lambda: live_server.state.engine.stats().num_running == 1)
    chunks.response.close()
    wait_until(lambda: live_server.state.engine.stats().num_running == 0)
