"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen2vl.server.state import ServerState
from tests.server.serving.pictures import picture, question

HELLO = [{"role": "user", "content": "Hello"}]


def post(client: TestClient, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_prompt_and_back(app_client: TestClient, server_state: ServerState) -> None:
    text = "h\u00e9llo \U0001f600 12"
    found = post(app_client, "/tokenize", model="nano", prompt=text, return_token_strs=True)
    tokenizer = server_state.engine.llm.processor.tokenizer
    assert found["tokens"] == tokenizer.encode_text(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == server_state.engine.llm.max_model_len
    assert post(app_client, "/detokenize", tokens=found["tokens"]) == {"prompt": text}
    assert "token_strs" not in post(app_client, "/tokenize", prompt=text)


def test_messages_are_those_of_a_chat(app_client: TestClient, server_state: ServerState) -> None:
    messages = question("What is it?", picture())
    found = post(app_client, "/tokenize", messages=messages)
    processor = server_state.engine.llm.processor
    assert found["tokens"] == processor(messages).input_ids
    text = post(app_client, "/detokenize", tokens=found["tokens"])["prompt"]
    assert text.count("<|image_pad|>") == 16 and text.endswith("<|im_start|>assistant\n")
    small = post(app_client, "/tokenize", messages=messages, max_pixels=56 * 56)
    assert small["count"] == found["count"] - 12
    body = {"messages": messages, "max_tokens": 1}
    usage = app_client.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == found["count"]


def test_options_of_the_chat_template(app_client: TestClient) -> None:
    plain = post(app_client, "/tokenize", messages=HELLO)["count"]
    assert (
        post(app_client, "/tokenize", messages=HELLO, add_generation_prompt=False)["count"] < plain
    )
    tool = {"type": "function", "function": {"name": "f"}}
    assert post(app_client, "/tokenize", messages=HELLO, tools=[tool])["count"] > plain
    messages = [*HELLO, {"role": "assistant", "content": "Hi"}]
    open_turn = post(app_client, "/tokenize", messages=messages, continue_final_message=True)
    assert post(app_client, "/detokenize", tokens=open_turn["tokens"])["prompt"].endswith("Hi")


def test_control_tokens_in_a_prompt_are_text(
    app_client: TestClient, server_state: ServerState
) -> None:
    found = post(app_client, "/tokenize", prompt="<|im_start|>")
    special = set(server_state.engine.llm.processor.tokenizer.special_ids.values())
    assert not special & set(found["tokens"])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "x", "chat_template": "y"}, "chat_template"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0]"),
        ("/detokenize", {"tokens": [1, 999_999]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
def test_refusals(app_client: TestClient, path: str, body: Any, param: str) -> None:
    response = app_client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_an_unknown_model(app_client: TestClient, path: str) -> None:
    body = {"model": "x", "prompt": "a"} if path == "/tokenize" else {"model": "x", "tokens": [1]}
    response = app_client.post(path, json=body)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
