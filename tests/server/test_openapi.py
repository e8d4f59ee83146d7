"""The OpenAPI description: complete, consistent, and without FastAPI's own assumptions."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen2vl.server.app import create_app
from tests.server.conftest import StateMaker

URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def description(app_client: TestClient) -> dict[str, Any]:
    response = app_client.get("/openapi.json")
    assert response.status_code == 200
    assert app_client.get("/openapi.json").content == response.content
    return response.json()


def test_all_routes_are_described(description: dict[str, Any]) -> None:
    assert set(description["paths"]) == {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"),
        *("/v1/models", "/v1/models/{model}", "/tokenize", "/detokenize"),
        *("/health", "/ping", "/ready", "/metrics", "/version"),
    }
    operations = [one for path in description["paths"].values() for one in path.values()]
    assert len({one["operationId"] for one in operations}) == len(operations)
    assert all(one.get("summary") for one in operations)


def test_references_resolve(description: dict[str, Any]) -> None:
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(description)))
    assert names <= set(description["components"]["schemas"])
    assert "HTTPValidationError" not in description["components"]["schemas"]


def test_refusals_have_openais_form(description: dict[str, Any]) -> None:
    chat = description["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(chat) >= {"200", "400", "404", "413", "415", "429", "500", "503"}
    assert "422" not in chat
    for status, response in chat.items():
        if status != "200":
            schema = response["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorResponse")
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}


def test_the_key_is_described_if_one_is_needed(
    description: dict[str, Any], make_state: StateMaker
) -> None:
    assert "securitySchemes" not in description["components"]
    state = make_state(api_keys=("key",), metrics_port=9000)
    client = TestClient(create_app(state), base_url=URL, headers={"Authorization": "Bearer key"})
    locked = client.get("/openapi.json").json()
    assert locked["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert locked["paths"]["/tokenize"]["post"]["security"] == [{"bearer": []}]
    assert locked["paths"]["/version"]["get"]["security"] == [{"bearer": []}]
    for path in ("/health", "/ping", "/ready"):
        assert "security" not in locked["paths"][path]["get"]
    assert "/metrics" not in locked["paths"]


def test_the_pages_that_load_scripts_of_other_sites_are_off(app_client: TestClient) -> None:
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert app_client.get(path).status_code == 404
