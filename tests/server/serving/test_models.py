"""The list of models, and LoRA adapters as models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import NotFoundError, OpenAI
from starlette.testclient import TestClient

from qwen2vl.engine import LLM, AsyncLLM
from qwen2vl.loading import load
from qwen2vl.server.app import create_app
from qwen2vl.server.config import ServerConfig
from tests.adapters import TEXT, write_adapter
from tests.server.conftest import LiveServer, build_state
from tests.server.serving.test_chat import HELLO, client

__all__ = ["client"]  # a fixture


def test_models(client: OpenAI, live_server: LiveServer) -> None:
    (model,) = client.models.list().data
    assert model.id == "nano" and model.object == "model"
    extra = model.model_extra or {}
    assert extra["max_model_len"] == live_server.state.engine.llm.max_model_len
    assert extra["parent"] is None and extra["root"] == "nano"
    assert extra["capabilities"]["vision"] and extra["capabilities"]["tools"]
    assert not extra["capabilities"]["audio"]
    assert extra["limits"]["max_images"] == 16
    assert client.models.retrieve("nano") == model
    with pytest.raises(NotFoundError) as info:
        client.models.retrieve("nanu")
    assert info.value.code == "model_not_found"


@pytest.fixture(scope="module")
def adapter_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Give a client of a server with two names and an adapter."""
    model, _ = load("nano")
    folder = write_adapter(tmp_path_factory.mktemp("lora") / "reverse", model, TEXT)
    del model
    config = ServerConfig(
        served_model_names=("nano", "org/alias"), lora_modules={"reverse": str(folder)}
    )
    with LLM("nano", dtype="float32", device="cpu", adapters={"reverse": folder}) as llm:
        engine = AsyncLLM(llm)
        state = build_state(engine, config)
        with TestClient(create_app(state), base_url="http://127.0.0.1:8000") as http:
            yield http
        engine.close()


def test_names_and_adapters_are_models(adapter_client: TestClient) -> None:
    models = adapter_client.get("/v1/models").json()["data"]
    assert [(m["id"], m["root"], m["parent"]) for m in models] == [
        ("nano", "nano", None),
        ("org/alias", "nano", None),
        ("reverse", "reverse", "nano"),
    ]
    assert adapter_client.get("/v1/models/org/alias").json()["id"] == "org/alias"


def test_the_model_selects_the_adapter(adapter_client: TestClient) -> None:
    answers = {}
    for name in ("nano", "org/alias", "reverse", None):
        body = {"model": name, "messages": HELLO, "max_tokens": 8, "temperature": 0}
        response = adapter_client.post("/v1/chat/completions", json=body).json()
        assert response["model"] == (name or "nano")
        answers[name] = response["choices"][0]["message"]["content"]
    assert answers["nano"] == answers["org/alias"] == answers[None] != answers["reverse"]
    body = {"model": "reverse", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    plain = {**body, "model": "nano"}
    texts = [
        adapter_client.post("/v1/completions", json=one).json()["choices"][0]["text"]
        for one in (body, plain)
    ]
    assert texts[0] != texts[1]
