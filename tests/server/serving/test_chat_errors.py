"""Chat completions that are refused, and those that fail in the engine."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from starlette.testclient import TestClient

from qwen2vl.engine.sampling.sampler import Sampler
from qwen2vl.errors import CapacityError, EngineDeadError, EngineError
from qwen2vl.server.errors import APIError
from qwen2vl.server.state import ServerState
from tests.server.conftest import ServerStarter
from tests.server.serving.pictures import picture, question
from tests.server.serving.scripted import scripted
from tests.server.serving.test_chat import HELLO, client, handle, refused

__all__ = ["client"]  # a fixture

# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "texts"),
    [
        ({"temprature": 1}, "temprature", ["did you mean temperature?"]),
        ({"top_logprobs": 2}, "top_logprobs", ["logprobs true"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream true"]),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            ["add_generation_prompt"],
        ),
        ({"continue_final_message": True}, "messages", ["assistant"]),
        ({"stop_token_ids": [999_999]}, "stop_token_ids", ["999999"]),
        ({"logit_bias": {"999999": 1}}, "logit_bias", ["999999"]),
        ({"guided_regex": "("}, "guided_regex", []),
        ({"guided_grammar": "start: nothing"}, "guided_grammar", ["guided_grammar: ", "nothing"]),
        (
            {"guided_grammar": 'root ::= "a" | [0-9] b-c\nb-c ::= "d"'},
            "guided_grammar",
            ["guided_grammar: the grammar is read in Lark", 'start: "a" | /[0-9]/ b_c and'],
        ),
        (
            {"structured_outputs": {"grammar": "root ::= 'a'"}},
            "structured_outputs.grammar",
            ["structured_outputs.grammar: ", 'start: "a" and'],
        ),
        ({"guided_json": 5}, "guided_json", ["got 5, must be an object or JSON text"]),
        ({"structured_outputs": {"json": []}}, "structured_outputs.json", ["an object or JSON"]),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
            ["response_format", "one of them"],
        ),
        ({"temperature": 0.0001}, "temperature", ["0.001"]),
        ({"max_tokens": 5000}, "max_tokens", ["5,000", "4,096", "lower max_tokens to"]),
        ({"fps": 2, "num_frames": 4}, "fps", ["num_frames"]),
        ({"max_pixels": 100, "mm_processor_kwargs": {"max_pixels": 200}}, "max_pixels", ["twice"]),
        ({"messages": [{"role": "user"}]}, "messages[0]", ["content"]),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0]", ["known roles"]),
        ({"audio": {"voice": "a"}}, "audio", ["not supported"]),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", []),
        ({"tool_choice": "required"}, "tool_choice", ["no tools; give tools"]),
        ({"tool_choice": "foo"}, "tool_choice", ["got 'foo', must be \"auto\"", "no tools"]),
    ],
)
def test_refusals_name_the_field(
    app_client: TestClient, body: dict[str, Any], param: str, texts: list[str]
) -> None:
    error = refused(app_client, **body)
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    for text in texts:
        assert text in error["message"]


def test_an_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as info:
        client.chat.completions.create(model="nanu", messages=HELLO)
    assert info.value.code == "model_not_found" and "nano" in info.value.message


def test_a_refusal_names_the_item(app_client: TestClient) -> None:
    bad = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [*HELLO, {"role": "assistant", "content": "Hi"}]
    messages.append({"role": "user", "content": [{"type": "text", "text": "What?"}, bad]})
    error = refused(app_client, messages=messages)
    assert error["param"] == "messages[2].content[1]"


@pytest.fixture
def small_context(server_state: ServerState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_state.engine.llm, "max_model_len", 400)


def fitting_pixels(error: dict[str, Any]) -> int:
    """Read the max_pixels that an error recommends."""
    found = re.search(r"max_pixels to ([\d,]+\d)", error["message"])
    assert found is not None, error["message"]
    return int(found[1].replace(",", ""))


@pytest.mark.usefixtures("small_context")
def test_the_context_is_explained(app_client: TestClient) -> None:
    messages = question("?", *[picture(size=336)] * 3)  # 144 tokens each
    error = refused(app_client, messages=messages)
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    assert "432 image tokens, more than 400, the context" in error["message"]
    body = {"messages": messages, "max_pixels": fitting_pixels(error), "max_tokens": 1}
    assert app_client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.usefixtures("small_context")
def test_max_tokens_is_explained_with_pictures(app_client: TestClient) -> None:
    body = {"messages": question("?", picture(size=336)), "max_tokens": 250}
    error = refused(app_client, **body)
    assert error["param"] == "max_tokens" and error["code"] == "context_length_exceeded"
    assert "144 image tokens of the prompt + 250 of the output (max_tokens) = " in error["message"]
    assert " > 400, the context (max_model_len); lower max_tokens to" in error["message"]
    body["max_pixels"] = fitting_pixels(error)
    body["logit_bias"] = {"260": 100}  # the end token
    assert app_client.post("/v1/chat/completions", json=body).status_code == 200


def test_the_context_ends_an_answer(
    app_client: TestClient, server_state: ServerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_state.engine.llm, "max_model_len", 80)
    (z,) = server_state.engine.llm.processor.tokenizer.encode_text("z")
    body = {"messages": HELLO, "logit_bias": {str(z): 100}}
    answer = app_client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 80


def test_more_samples_than_the_engine_runs(
    app_client: TestClient, server_state: ServerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = server_state.engine.llm
    monkeypatch.setattr(llm, "engine_config", replace(llm.engine_config, max_num_seqs=2))
    assert "at most 2 (max_num_seqs)" in refused(app_client, n=3)["message"]


# Failures ---------------------------------------------------------------------------------------


def test_a_failed_request_is_an_internal_error(server_state: ServerState) -> None:
    state = scripted(server_state, "x", errors={0: EngineError("logits at 0x7f not finite")})
    with pytest.raises(APIError) as info:
        handle(state)
    assert info.value.status == 500 and info.value.type == "server_error"
    assert "0x7f" not in info.value.message and "req-1" in info.value.message
    assert state.engine.streams[0].is_aborted  # type: ignore[attr-defined]


def test_a_dead_engine_is_unavailable(server_state: ServerState) -> None:
    state = scripted(server_state, "x", errors={0: EngineDeadError("the engine died: secret")})
    with pytest.raises(APIError) as info:
        handle(state)
    assert info.value.status == 503 and "secret" not in info.value.message


def test_one_failed_sample_fails_the_request(server_state: ServerState) -> None:
    state = scripted(server_state, "a", "b", "c", errors={1: EngineError("bug")})
    with pytest.raises(APIError) as info:
        handle(state, n=3)
    assert info.value.status == 500


def test_out_of_memory_is_explained(server_state: ServerState) -> None:
    error = CapacityError("out of memory while answering a prompt of 9 tokens; lower max_pixels")
    with pytest.raises(APIError, match="lower max_pixels") as info:
        handle(scripted(server_state, "x", errors={0: error}))
    assert info.value.status == 400


def test_logits_that_are_not_finite_fail_one_request(
    start_server: ServerStarter, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start_server()
    real = Sampler.sample
    bad_seed = 4242

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "seed_of_test", None) == bad_seed:
            raise EngineError("the model's logits are not finite")
        return real(self, *args, **kwargs)

    original = Sampler.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.seed_of_test = kwargs.get("seed")

    monkeypatch.setattr(Sampler, "__init__", init)
    monkeypatch.setattr(Sampler, "sample", sample)

    async def both() -> tuple[Any, Any]:
        client = AsyncOpenAI(base_url=f"{live.base_url}/v1", api_key="none", max_retries=0)
        async with client:
            create = client.chat.completions.create
            return await asyncio.gather(
                create(model="nano", messages=HELLO, max_tokens=8, seed=bad_seed),
                create(model="nano", messages=HELLO, max_tokens=8, seed=1),
                return_exceptions=True,
            )

    bad, good = asyncio.run(both())
    assert isinstance(bad, openai.InternalServerError) and bad.status_code == 500
    assert good.choices[0].message.content is not None
