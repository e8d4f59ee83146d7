"""/v1/embeddings: equal to LLM.embed, in OpenAI's and vLLM's forms, judged by OpenAI's client."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from qwen2vl import load
from qwen2vl.engine import LLM, AsyncLLM
from qwen2vl.processor.media.decoder import LOCAL_DECODER
from qwen2vl.server.app import create_app
from qwen2vl.server.config import ServerConfig
from qwen2vl.server.launch import build_state, prepare_llm
from qwen2vl.server.protocol import embeddings as protocol
from qwen2vl.server.serving import embeddings as serving
from tests.adapters import TEXT, write_adapter
from tests.server.conftest import LiveServer

URL = "/v1/embeddings"
TEXTS = ["a yellow triangle", "a red square", "blue"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Give nano without a server."""
    with LLM("nano", dtype="float32", device="cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def client(live_server: LiveServer) -> Iterator[openai.OpenAI]:
    url = f"{live_server.base_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def picture(color: str = "red") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (84, 56), color).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def conversation(color: str = "red") -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": picture(color)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]


def raw_vectors(async_llm: AsyncLLM, texts: list[str], **options: Any) -> np.ndarray:
    processor = async_llm.llm.processor
    prompts = [processor.from_text(text, allow_special_tokens=False) for text in texts]
    return asyncio.run(async_llm.embed(prompts, **options)).numpy()


def vectors_of(response: Any) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([one["embedding"] for one in response.json()["data"]], dtype=np.float32)


def test_the_official_client_gets_a_vector_for_each_text(
    client: openai.OpenAI, async_llm: AsyncLLM
) -> None:
    result = client.embeddings.create(model="nano", input=TEXTS)
    assert [one.index for one in result.data] == [0, 1, 2]
    assert result.model == "nano" and result.object == "list"
    vectors = np.array([one.embedding for one in result.data], dtype=np.float32)
    want = raw_vectors(async_llm, TEXTS)
    assert np.abs(vectors - want).max() < 1e-6
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    tokenizer = async_llm.llm.processor.tokenizer
    assert result.usage.prompt_tokens == sum(len(tokenizer.encode_text(text)) for text in TEXTS)
    assert result.usage.total_tokens == result.usage.prompt_tokens


def test_numbers_and_base64_are_the_same_values(app_client: TestClient) -> None:
    body = {"model": "nano", "input": "a red square"}
    numbers = vectors_of(app_client.post(URL, json=body))
    (encoded,) = app_client.post(URL, json={**body, "encoding_format": "base64"}).json()["data"]
    decoded = np.frombuffer(base64.b64decode(encoded["embedding"]), dtype="<f4")
    assert np.array_equal(decoded, numbers[0])


def test_token_ids_are_embedded_as_their_text(app_client: TestClient, async_llm: AsyncLLM) -> None:
    tokenizer = async_llm.llm.processor.tokenizer
    ids = [tokenizer.encode_text(text) for text in TEXTS]
    want = vectors_of(app_client.post(URL, json={"input": TEXTS}))
    assert np.array_equal(vectors_of(app_client.post(URL, json={"input": ids})), want)
    mixed = vectors_of(app_client.post(URL, json={"input": [ids[0], TEXTS[1]]}))
    assert np.abs(mixed - want[:2]).max() < 1e-6
    single = vectors_of(app_client.post(URL, json={"input": ids[0]}))
    assert single.shape == (1, want.shape[1]) and np.abs(single - want[:1]).max() < 1e-6


def test_control_tokens_in_text_stay_text(app_client: TestClient, async_llm: AsyncLLM) -> None:
    tokenizer = async_llm.llm.processor.tokenizer
    token = tokenizer.token_to_id("<|im_start|>")
    as_text = app_client.post(URL, json={"input": "<|im_start|>"})
    as_token = app_client.post(URL, json={"input": [token]})
    assert as_token.json()["usage"]["prompt_tokens"] == 1
    assert as_text.json()["usage"]["prompt_tokens"] > 1
    assert np.abs(vectors_of(as_text) - vectors_of(as_token)).max() > 0.01


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_conversations_with_pictures_are_embedded_as_by_the_llm(
    app_client: TestClient, llm: LLM, pooling: Any
) -> None:
    for color in ("red", "blue"):
        body = {"model": "nano", "messages": conversation(color), "pooling": pooling}
        response = app_client.post(URL, json=body)
        want = llm.embed(conversation(color), pooling=pooling).numpy()
        assert np.abs(vectors_of(response) - want).max() < 1e-6
    usage = response.json()["usage"]
    prompt = llm.processor(conversation())
    assert usage["prompt_tokens"] == usage["total_tokens"] == len(prompt.input_ids)
    assert usage["prompt_tokens_details"]["image_tokens"] == prompt.image_tokens > 0
    (media,) = usage["media"]
    assert media["param"] == "messages[0].content[0]"
    assert media["original_size"] == {"width": 84, "height": 56}
    assert media["tokens"] == prompt.image_tokens


def test_options_of_messages(app_client: TestClient, llm: LLM) -> None:
    body = {"messages": conversation(), "max_pixels": 3136}
    response = app_client.post(URL, json=body)
    default = llm.processor(conversation()).image_tokens
    assert 0 < response.json()["usage"]["media"][0]["tokens"] < default
    bare = app_client.post(URL, json={"messages": conversation(), "add_generation_prompt": False})
    prompt = llm.processor(conversation(), add_generation_prompt=False)
    assert bare.json()["usage"]["prompt_tokens"] == len(prompt.input_ids)


def test_adapters_are_models(tmp_path: Path, app_client: TestClient) -> None:
    write_adapter(tmp_path / "forms", load("nano", dtype="float32")[0], TEXT)
    adapters = {"forms": str(tmp_path / "forms")}
    with LLM("nano", dtype="float32", device="cpu", adapters=adapters) as llm:
        want = llm.embed(conversation(), adapter="forms").numpy()
        config = ServerConfig(lora_modules=adapters)
        prepare_llm(llm, config, LOCAL_DECODER)
        engine = AsyncLLM(llm)
        app = create_app(build_state(engine, config))
        with TestClient(app, base_url="http://127.0.0.1:8000") as client:
            response = client.post(URL, json={"model": "forms", "messages": conversation()})
        engine.close()
    assert np.abs(vectors_of(response) - want).max() < 1e-6
    assert response.json()["model"] == "forms"
    base = vectors_of(app_client.post(URL, json={"messages": conversation()}))
    assert np.abs(base - want).max() > 1e-3


def test_dimensions_are_those_of_the_model(app_client: TestClient) -> None:
    body = {"input": "blue", "dimensions": 192}
    assert vectors_of(app_client.post(URL, json=body)).shape == (1, 192)
    error = app_client.post(URL, json={**body, "dimensions": 64}).json()["error"]
    assert error["param"] == "dimensions"
    assert "got 64, but the vectors of this model have 192" in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "give input or messages"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "input", "excludes"),
        ({"input": ""}, "input", "is empty"),
        ({"input": ["a", ""]}, "input[1]", "is empty"),
        ({"input": []}, "input", ""),
        ({"input": [[]]}, "input[0]", ""),
        ({"input": [["a"]]}, "input[0]", ""),
        ({"input": 3}, "input", ""),
        ({"input": ["a", [10**8]]}, "input[1]", "token id 0 is 100000000"),
        ({"input": ["a", "x" * 100_000]}, "input[1]", "context"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "base64"),
        ({"input": "a", "pooling": "max"}, "pooling", "mean"),
        ({"input": "a", "dimension": 3}, "dimension", "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens", "never truncated"),
        ({"input": "a", "normalize": False}, "normalize", "always L2-normalized"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]},
            "messages[0].content[0]",
            "",
        ),
    ],
)
def test_refusals_name_the_field(
    app_client: TestClient, body: dict[str, Any], param: str, message: str
) -> None:
    response = app_client.post(URL, json=body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]
    assert len(error["message"]) < 500


def test_the_official_client_raises_its_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="nanno", input="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="nano", input="a", dimensions=3)
    assert refused.value.param == "dimensions"


def test_the_numbers_of_inputs_and_tokens_are_limited(
    app_client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_many = ["a"] * (protocol.MAX_INPUTS + 1)
    error = app_client.post(URL, json={"input": too_many}).json()["error"]
    assert error["param"] == "input" and "2048" in error["message"].replace(",", "")
    monkeypatch.setattr(serving, "MAX_INPUT_TOKENS", 5)
    error = app_client.post(URL, json={"input": [[1, 2, 3], [4, 5, 6]]}).json()["error"]
    assert error["param"] == "input[1]"
    assert "the limit of a request is 5; send fewer at once" in error["message"]


def test_many_inputs_and_answers_together(client: openai.OpenAI) -> None:
    def embed(count: int) -> int:
        result = client.embeddings.create(model="nano", input=["a red square"] * count)
        return len(result.data)

    def ask(_: int) -> int:
        answer = client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
        )
        return len(answer.choices)

    with ThreadPoolExecutor(6) as pool:
        embedded = [pool.submit(embed, count) for count in (1, 40, 300)]
        answered = [pool.submit(ask, index) for index in range(3)]
        assert [one.result() for one in embedded] == [1, 40, 300]
        assert [one.result() for one in answered] == [1, 1, 1]


def test_prompts_are_counted(app_client: TestClient) -> None:
    def total() -> float:
        lines = app_client.get("/metrics").text.splitlines()
        (line,) = (line for line in lines if line.startswith("qwen2vl:prompt_tokens_total"))
        return float(line.split()[-1])

    before = total()
    usage = app_client.post(URL, json={"input": TEXTS}).json()["usage"]
    assert total() - before == usage["prompt_tokens"]


def test_salts_change_no_vector(app_client: TestClient) -> None:
    bodies = [{"messages": conversation(), "cache_salt": salt} for salt in ("a", "b")]
    one, other = (vectors_of(app_client.post(URL, json=body)) for body in bodies)
    assert np.array_equal(one, other)
    assert torch.isfinite(torch.from_numpy(one)).all()
