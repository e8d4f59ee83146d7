"""The Responses API with nano: answers, tools, formats and refusals."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from starlette.testclient import TestClient

from qwen2vl.errors import EngineDeadError, EngineError
from qwen2vl.server.errors import APIError
from qwen2vl.server.protocol.responses import ResponsesRequest
from qwen2vl.server.serving.responses import create_response
from qwen2vl.server.state import Caller, ServerState
from tests.server.conftest import LiveServer
from tests.server.serving.pictures import data_url, picture
from tests.server.serving.scripted import scripted

COLOR = "What color is the circle?"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Answer(BaseModel):
    """A format for `responses.parse`."""

    is_red: bool


@pytest.fixture(scope="module")
def client(live_server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"{live_server.base_url}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, given: Any, **options: Any) -> Any:
    defaults = {"model": "nano", "max_output_tokens": 24, "temperature": 0}
    return client.responses.create(input=given, **{**defaults, **options})


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def image(color: str) -> dict[str, Any]:
    return {"type": "input_image", "image_url": data_url(picture(color)), "detail": "auto"}


def text(content: str) -> dict[str, Any]:
    return {"type": "input_text", "text": content}


def handle(state: ServerState, **body: Any) -> Any:
    request = ResponsesRequest.model_validate({"input": "Hi", **body})

    async def run() -> Any:
        result: Any = await create_response(state, request, Caller("req-1"))
        return [event async for event in result] if body.get("stream") else result

    return asyncio.run(run())


# Answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("color", ["red", "blue"])
def test_an_answer_about_a_picture_equals_that_of_chat(client: OpenAI, color: str) -> None:
    response = ask(client, [user(image(color), text(COLOR))])
    chat = client.chat.completions.create(
        model="nano",
        max_tokens=24,
        temperature=0,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(picture(color))}},
                    {"type": "text", "text": COLOR},
                ],
            }
        ],
    )
    assert color in response.output_text.lower()
    assert response.output_text == chat.choices[0].message.content
    assert response.status == "completed"
    assert response.id.startswith("resp_")
    assert response.output[0].id.startswith("msg_")
    assert response.usage.input_tokens == chat.usage.prompt_tokens  # type: ignore[union-attr]
    assert response.usage.input_tokens_details.image_tokens == 16
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    (seen,) = response.usage.media
    assert seen["param"] == "input[0].content[0]"
    assert seen["original_size"] == {"width": 112, "height": 112}


def test_a_stream_joins_to_the_response(client: OpenAI) -> None:
    whole = ask(client, [user(image("red"), text(COLOR))])
    with client.responses.stream(
        model="nano",
        input=[user(image("red"), text(COLOR))],  # type: ignore[list-item]
        temperature=0,
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text
    assert len(deltas) > 1
    assert final.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_request_is_repeated(client: OpenAI) -> None:
    response = ask(
        client,
        "Hello",
        instructions="Be brief.",
        metadata={"run": "7"},
        tools=[WEATHER],
        tool_choice="none",
        top_p=0.5,
        user="someone",
        store=True,
        reasoning={"effort": "low"},
        truncation="disabled",
        text={"verbosity": "low"},
        include=["reasoning.encrypted_content"],
    )
    assert response.metadata == {"run": "7"}
    assert response.instructions == "Be brief."
    assert response.tools[0].name == "get_weather"
    assert response.tool_choice == "none"
    assert (response.top_p, response.temperature, response.max_output_tokens) == (0.5, 0.0, 24)
    assert response.parallel_tool_calls is True
    assert response.text.format.type == "text"
    assert response.store is False  # nothing is stored, whatever was asked for
    assert response.previous_response_id is None
    assert response.output_text


def test_a_limit_makes_the_response_incomplete(client: OpenAI) -> None:
    response = ask(client, "Hello", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    assert response.completed_at is None
    with client.responses.stream(model="nano", input="Hello", max_output_tokens=2) as stream:
        last: Any = list(stream)[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_logprobs_join_to_the_text(client: OpenAI) -> None:
    options: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (part,) = ask(client, "Hello", **options).output[0].content
    assert "".join(one.token for one in part.logprobs) == part.text
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)
    assert ask(client, "Hello").output[0].content[0].logprobs == []
    with client.responses.stream(
        model="nano", input="Hello", max_output_tokens=24, temperature=0, **options
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    streamed = [
        (one.token, one.logprob)
        for event in events
        if event.type == "response.output_text.delta"
        for one in event.logprobs
    ]
    assert streamed == [(one.token, one.logprob) for one in part.logprobs]
    assert final.output[0].content[0].logprobs == part.logprobs  # type: ignore[union-attr]


def test_an_earlier_answer_is_sent_back(client: OpenAI) -> None:
    first = ask(client, [user(image("red"), text(COLOR))])
    items = [user(image("red"), text(COLOR)), *first.output, user(text("And its shape?"))]
    second = ask(client, items)
    assert second.output_text
    assert second.usage.input_tokens_details.cached_tokens > 0
    assert second.usage.input_tokens > first.usage.input_tokens


# Formats and tools ------------------------------------------------------------------------------


def test_parse_gives_an_object(client: OpenAI) -> None:
    response = client.responses.parse(
        model="nano",
        input=[user(image("red"), text("Is it red?"))],  # type: ignore[list-item]
        text_format=Answer,
        temperature=0,
    )
    assert isinstance(response.output_parsed, Answer)
    assert response.text is not None
    with client.responses.stream(model="nano", input="Is it red?", text_format=Answer) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Answer)


def test_json_object(client: OpenAI) -> None:
    response = ask(client, "Hello", text={"format": {"type": "json_object"}}, max_output_tokens=200)
    assert response.output_text.startswith("{")


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "get_weather"}],
        },
    ],
)
def test_forced_calls(client: OpenAI, choice: Any) -> None:
    clock = {"type": "function", "name": "clock", "parameters": None, "strict": None}
    tools = [WEATHER] if choice == "required" else [clock, WEATHER]
    response = ask(
        client,
        "How is the weather?",
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=False,
        max_output_tokens=100,
    )
    (call,) = response.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    assert call.call_id.startswith("call_")
    assert call.id.startswith("fc_")
    assert response.output_text == ""


def test_a_loop_with_a_picture_in_the_result(client: OpenAI) -> None:
    tool = {"type": "function", "name": "look", "parameters": None, "strict": None}
    first = ask(client, COLOR, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    (call,) = first.output
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": [text("A picture:"), image("blue")],
    }
    second = ask(client, [user(text(COLOR)), call, result], tools=[tool])
    assert second.usage.input_tokens_details.image_tokens == 16
    assert second.usage.media[0]["param"] == "input[2].output[1]"
    assert not second.output_text.startswith(":")
    assert second.output_text


def test_strict_tools_do_not_change_an_answer(client: OpenAI) -> None:
    plain = ask(client, "Hello", tools=[{**WEATHER, "strict": False}])
    assert ask(client, "Hello", tools=[WEATHER]).output_text == plain.output_text


def test_a_format_and_tools_go_together(client: OpenAI) -> None:
    response = client.responses.parse(
        model="nano",
        input="Is it red?",
        text_format=Answer,
        temperature=0,
        tools=[WEATHER],  # type: ignore[list-item]
    )
    (item,) = response.output
    assert item.type == "function_call" or isinstance(response.output_parsed, Answer)


# Grounding, refusals and failures ---------------------------------------------------------------


def test_grounding_in_pixels(server_state: ServerState) -> None:
    boxes = "<|object_ref_start|>it<|object_ref_end|><|box_start|>(0,0),(500,250)<|box_end|>"
    state = scripted(server_state, boxes)
    (item,) = handle(state, input=[user(image("red"))], return_grounding=True).output
    assert item.content[0].text == "it(0,0),(500,250)"
    (box,) = item.grounding
    assert box.label == "it"
    assert box.pixels[0].param == "input[0].content[0]"
    assert box.pixels[0].coordinates == [0.0, 0.0, 56.0, 28.0]
    (name, data) = handle(state, input=[user(image("red"))], return_grounding=True, stream=True)[-1]
    assert name == "response.completed"
    (sent,) = json.loads(data)["response"]["output"]
    assert sent["grounding"] == [box.model_dump()]
    (without,) = handle(state, input=[user(image("red"))]).output
    assert "grounding" not in without.model_dump()


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("previous_response_id", "resp_1", "send the whole conversation as input"),
        ("conversation", {"id": "c"}, "send the whole conversation as input"),
        ("background", True, "leave it out"),
        ("prompt", {"id": "p"}, "send instructions and input"),
        ("truncation", "auto", "shorten the input"),
        ("n", 2, "send several requests"),
        ("top_logprobs", 3, "needs include"),
        ("include", ["message.output_text.logprob"], "message.output_text.logprobs"),
        ("metadata", {"a": 1}, "must be a string"),
        ("max_output_tokens", 0, "1 or more"),
        ("max_output_tokens", 5000, "lower max_output_tokens to"),
        ("max_tokens", 5, "did you mean"),
        ("messages", [], "did you mean input"),
        ("tools", [{"type": "web_search"}], "only functions"),
        ("tool_choice", "required", "give tools"),
        ("stream_options", {"include_usage": True}, "needs stream true"),
    ],
)
def test_refusals_name_the_field(
    app_client: TestClient, field: str, value: Any, remedy: str
) -> None:
    response = app_client.post("/v1/responses", json={"input": "Hi", field: value})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(field)
    assert remedy in error["message"]


def test_a_schema_that_cannot_be_obeyed_is_refused_before_the_stream(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"x": {"not": {}}}}
    text_format: Any = {"format": {"type": "json_schema", "name": "f", "schema": schema}}
    with pytest.raises(
        openai.BadRequestError, match="#/properties/x has the keyword 'not'"
    ) as info:
        ask(client, "Hello", text=text_format, stream=True)
    assert info.value.param == "text.format.schema"
    with pytest.raises(openai.BadRequestError) as info:
        ask(client, "Hello", tools=[{**WEATHER, "parameters": schema}], tool_choice="required")
    assert info.value.param == "tools[0].parameters"
    with pytest.raises(openai.BadRequestError) as info:
        ask(client, [user({"type": "input_image", "image_url": "data:image/png;base64,AAAA"})])
    assert info.value.param == "input[0].content[0]"


def test_a_grammar_that_cannot_be_compiled_names_the_field(client: OpenAI) -> None:
    """The pattern is a regular expression for Python, but not for the grammar's engine."""
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": "(?=a)b"}}}
    text_format: Any = {"format": {"type": "json_schema", "name": "f", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as info:
        ask(client, "Hello", text=text_format)
    assert str(info.value.param).startswith("text.format")


def test_an_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(client, "Hello", model="gpt-6")


def test_a_failure_ends_a_stream_with_an_event(server_state: ServerState) -> None:
    state = scripted(server_state, ["He", "llo", "!"], errors={0: EngineError("at 0x1234")})
    events = handle(state, stream=True)
    names = [name for name, _ in events]
    assert names[-2:] == ["response.output_item.done", "response.failed"]
    last = json.loads(events[-1][1])
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert "req-1" in last["response"]["error"]["message"]
    assert "0x1234" not in events[-1][1]
    assert last["response"]["output"][0]["content"][0]["text"] == "Hello"
    with pytest.raises(APIError) as caught:
        handle(state)
    assert caught.value.status == 500


def test_a_dead_engine_is_unavailable(server_state: ServerState) -> None:
    state = scripted(server_state, "x", errors={0: EngineDeadError("gone")})
    with pytest.raises(APIError) as caught:
        handle(state)
    assert caught.value.status == 503


def test_an_answer_without_text_is_an_empty_message(server_state: ServerState) -> None:
    response = handle(scripted(server_state, ""))
    (item,) = response.output
    assert item.content[0].text == ""
    events = handle(scripted(server_state, ""), stream=True)
    assert [name for name, _ in events][2:-1] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
