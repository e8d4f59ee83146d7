"""What the server answers is accepted as history: messages, tool calls and output items."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI
from pydantic import BaseModel
from starlette.testclient import TestClient

from qwen2vl.processor.messages import parse_messages
from qwen2vl.server.serving.responses import parse_input
from qwen2vl.server.state import ServerState
from tests.server.conftest import LiveServer
from tests.server.serving import test_chat, test_responses
from tests.server.serving.pictures import data_url, picture, question
from tests.server.serving.scripted import scripted

CHAT = "/v1/chat/completions"
BOX = "<|object_ref_start|>a box<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
FUNCTION = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}
FLAT_CALL = {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}
ASKED = [{"role": "user", "content": "Is it raining?"}]


class Answer(BaseModel):
    """A format of `parse`."""

    is_red: bool


@pytest.fixture(scope="module")
def client(live_server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"{live_server.base_url}/v1", api_key="none", max_retries=0)


def results_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of a message's tool calls; a question if it has none."""
    calls = message.get("tool_calls") or []
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "yes"} for one in calls]
    return results or [{"role": "user", "content": "And now?"}]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": True, "top_logprobs": 2, "return_token_ids": True},
        {"n": 2, "temperature": 1, "seed": 1},
        {"return_grounding": True},
        {"skip_special_tokens": False, "stop": "e"},
        {"response_format": {"type": "json_object"}, "max_tokens": 1},
        CALL,
        {**CALL, "max_tokens": 3},  # a call that is cut
    ],
)
def test_chat_messages_are_accepted(app_client: TestClient, options: dict[str, Any]) -> None:
    body = {"max_tokens": 24, "temperature": 0, **options}
    messages = question("Where is the circle?", picture("red"))
    response = app_client.post(CHAT, json={"messages": messages, **body})
    assert response.status_code == 200, response.text
    for choice in response.json()["choices"]:
        message = choice["message"]
        history = [*messages, message, *results_of(message)]
        again = app_client.post(CHAT, json={"messages": history, "max_tokens": 1})
        assert again.status_code == 200, again.text


def test_grounding_is_accepted(server_state: ServerState) -> None:
    messages = question("Where?", picture("red"))
    body = {"messages": messages, "return_grounding": True}
    response = test_chat.handle(scripted(server_state, BOX), **body)
    message = response.choices[0].message.model_dump()
    assert message["grounding"]
    assert len(parse_messages([*messages, message])) == 2
    given = [{"role": "user", "content": [test_responses.image("red")]}]
    state = scripted(server_state, BOX)
    output = test_responses.handle(state, input=given, return_grounding=True).output
    (item,) = [json.loads(one.model_dump_json()) for one in output]
    assert item["grounding"]
    assert [one.role for one in parse_input([*given, item])] == ["user", "assistant"]


def test_the_objects_of_openais_client_are_accepted(client: OpenAI) -> None:
    for options in ({}, {**CALL, "max_tokens": 32}, {"extra_body": {"return_grounding": True}}):
        body: Any = {"model": "nano", "max_tokens": 24, "temperature": 0, **options}
        create: Any = client.chat.completions.create
        message = create(messages=ASKED, **body).choices[0].message
        for sent in (message, message.model_dump(), message.model_dump(exclude_none=True)):
            history = [*ASKED, sent, *results_of(message.model_dump())]
            assert create(model="nano", messages=history, max_tokens=1).choices


def test_the_objects_of_parse_are_accepted(client: OpenAI) -> None:
    parse: Any = client.chat.completions.parse
    parsed = parse(model="nano", messages=ASKED, response_format=Answer, temperature=0)
    message = parsed.choices[0].message
    assert message.parsed is not None
    history: Any = [*ASKED, message, *ASKED]
    assert client.chat.completions.create(model="nano", messages=history, max_tokens=1).choices
    parse = client.responses.parse
    parsed = parse(model="nano", input=ASKED, text_format=Answer, temperature=0)
    history = [*ASKED, *(one.model_dump() for one in parsed.output), *ASKED]
    assert client.responses.create(model="nano", input=history, max_output_tokens=16).output


def output_items(response: Any) -> list[dict[str, Any]]:
    """Return the results of the function calls among output items; a question if there are none."""
    calls = [one.call_id for one in response.output if one.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": i, "output": "yes"} for i in calls]
    return results or [*ASKED]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"extra_body": {"return_grounding": True}},
        {"text": {"format": {"type": "json_object"}}},
        FLAT_CALL,
        {**FLAT_CALL, "max_output_tokens": 3},  # a call that is cut
    ],
)
def test_output_items_are_accepted(client: OpenAI, options: dict[str, Any]) -> None:
    content = [
        {"type": "input_image", "image_url": data_url(picture("red"))},
        {"type": "input_text", "text": "Where is the circle?"},
    ]
    given: list[Any] = [{"role": "user", "content": content}]
    body: Any = {"model": "nano", "max_output_tokens": 24, "temperature": 0, **options}
    for stream in (False, True):
        create: Any = client.responses.create
        response = create(input=given, **body, stream=stream)
        if stream:
            (*_, last) = response
            response = last.response
        for output in (response.output, [one.model_dump() for one in response.output]):
            history = [*given, *output, *output_items(response)]
            assert create(model="nano", input=history, max_output_tokens=1).id


def test_pieces_of_a_stream_are_accepted(client: OpenAI) -> None:
    """Joined as OpenAI's examples do it, with the index of each call."""
    create: Any = client.chat.completions.create
    chunks = create(model="nano", messages=ASKED, stream=True, temperature=0, **CALL)
    calls: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or ():
            call = calls.setdefault(delta.index, delta.model_dump(exclude_none=True))
            if call.get("id") != delta.id and delta.function.arguments:
                known = call["function"].get("arguments", "")
                call["function"]["arguments"] = known + delta.function.arguments
    message = {"role": "assistant", "tool_calls": list(calls.values())}
    assert calls
    history = [*ASKED, message, *results_of(message)]
    assert create(model="nano", messages=history, max_tokens=1).choices
