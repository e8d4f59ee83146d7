"""Completions of raw prompts, judged by the official openai client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from qwen2vl.engine import PreparedRequest, SamplingParams
from qwen2vl.errors import EngineError
from qwen2vl.server.errors import APIError
from qwen2vl.server.protocol.completions import CompletionRequest
from qwen2vl.server.serving.completions import create_completion
from qwen2vl.server.state import Caller, ServerState
from tests.server.conftest import LiveServer
from tests.server.serving.scripted import scripted
from tests.server.serving.test_chat import client

__all__ = ["client"]  # a fixture


def complete(client: OpenAI, prompt: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    return client.completions.create(model="nano", prompt=prompt, **{**defaults, **options})


def test_a_prompt_is_continued_as_the_llm_does(client: OpenAI, live_server: LiveServer) -> None:
    answer = complete(client, "red blue ", extra_body={"return_token_ids": True})
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    (choice,) = answer.choices
    llm = live_server.state.engine
    prepared = llm.llm.processor.from_text("red blue ")
    assert choice.prompt_token_ids == prepared.input_ids

    async def alone() -> Any:
        params = SamplingParams(temperature=0, max_tokens=8, skip_grounding_tokens=True)
        stream = llm.stream_prepared(PreparedRequest(prepared, params, 0.0))
        return (await stream.completions())[0]

    expected = asyncio.run(alone())
    assert (choice.text, choice.token_ids) == (expected.text, list(expected.token_ids))
    assert answer.usage.prompt_tokens == len(prepared.input_ids)


def test_all_forms_of_a_prompt(client: OpenAI, live_server: LiveServer) -> None:
    tokenizer = live_server.state.engine.llm.processor.tokenizer
    ids = [tokenizer.encode_text(text) for text in ("abc", "xyz")]
    texts = [complete(client, text).choices[0].text for text in ("abc", "xyz")]
    for prompt in (["abc", "xyz"], ids, ["abc", ids[1]]):
        answer = complete(client, prompt)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == texts
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert complete(client, ids[0]).choices[0].text == texts[0]


def test_samples_are_numbered_over_prompts(client: OpenAI) -> None:
    answer = complete(client, ["abc", "xyz"], n=2, best_of=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["abc", "abc", "xyz", "xyz"]


def test_control_tokens_in_text_are_text(client: OpenAI, live_server: LiveServer) -> None:
    tokenizer = live_server.state.engine.llm.processor.tokenizer
    text = "<|im_start|><|image_pad|>"
    answer = complete(client, text, extra_body={"return_token_ids": True})
    ids = answer.choices[0].prompt_token_ids
    assert len(ids) > 10 and not set(ids) & set(tokenizer.special_ids.values())
    given = [tokenizer.token_to_id("<|im_start|>"), *tokenizer.encode_text("user\n")]
    assert complete(client, given).usage.prompt_tokens == len(given)
    with pytest.raises(openai.BadRequestError, match="image_pad"):
        complete(client, [tokenizer.token_to_id("<|image_pad|>")])


def test_logprobs_in_the_legacy_form(client: OpenAI) -> None:
    (choice,) = complete(client, "abc", logprobs=2).choices
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values()) and len(top) == 2
    assert complete(client, "abc").choices[0].logprobs is None
    zero = complete(client, "abc", logprobs=0).choices[0].logprobs
    assert [list(top) for top in zero.top_logprobs] == [[token] for token in zero.tokens]


@pytest.mark.parametrize("prompt", ["abc", ["abc", "xyz", "123"]])
def test_the_chunks_join_to_the_answer(client: OpenAI, prompt: Any) -> None:
    options = {"n": 2, "temperature": 8.0, "seed": 3, "logprobs": 1, "max_tokens": 6}
    whole = complete(client, prompt, **options)
    chunks = list(
        complete(client, prompt, stream=True, stream_options={"include_usage": True}, **options)
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    for expected in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == expected.index]
        assert "".join(part.text for part in parts) == expected.text
        assert [p.finish_reason for p in parts if p.finish_reason] == [expected.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [one for part in parts for one in getattr(part.logprobs, name)]
            assert joined == getattr(expected.logprobs, name), name


def test_echo_in_a_stream(client: OpenAI) -> None:
    chunks = list(complete(client, ["abc", "xyz"], stream=True, echo=True))
    for index, prompt in enumerate(("abc", "xyz")):
        texts = [c.text for chunk in chunks for c in chunk.choices if c.index == index]
        assert texts[0].startswith(prompt) and not any(prompt in text for text in texts[1:])


def test_stop_and_structured_output(client: OpenAI) -> None:
    forced = complete(client, "x", extra_body={"guided_choice": ["yes no"]})
    assert forced.choices[0].text == "yes no"
    cut = complete(client, "x", stop=[" "], extra_body={"guided_choice": ["yes no"]})
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("yes", "stop")
    assert (forced.choices[0].stop_reason, cut.choices[0].stop_reason) == (None, " ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "logprobs"),
        ({"prompt": "x", "stream_options": {}}, "stream_options"),
        ({"prompt": "x", "prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": "x", "max_tokens": 5000}, "max_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a", [999_999]]}, "prompt[1]"),
        ({"prompt": "x", "guided_regex": "("}, "guided_regex"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_refusals_name_the_field(app_client: TestClient, body: Any, param: str) -> None:
    response = app_client.post("/v1/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


def test_a_failure_of_one_prompt_ends_the_stream(server_state: ServerState) -> None:
    state = scripted(server_state, ["a", "b"], errors={0: EngineError("secret")})
    body = CompletionRequest.model_validate({"prompt": ["x", "y"], "stream": True})

    async def read() -> None:
        events: Any = await create_completion(state, body, Caller("req-1"))
        async for event in events:
            json.loads(event)

    with pytest.raises(APIError) as info:
        asyncio.run(read())
    assert info.value.status == 500
    assert all(stream.is_aborted for stream in state.engine.streams)  # type: ignore[attr-defined]


def test_the_completions_of_one_request_are_limited(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="72 completions, at most 64") as error:
        complete(client, ["a"] * 9, n=8)
    assert error.value.param == "n"
