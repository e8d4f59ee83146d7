"""The application: routes, refusals in OpenAI's form, admission, timeouts, metrics, models."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

import qwen2vl
from qwen2vl.server.admission import Admission
from qwen2vl.server.app import create_app, create_metrics_app, load_operations
from qwen2vl.server.routing import Operation
from tests.server.conftest import LiveServer, ServerStarter, StateMaker, wait_until

URL = "http://127.0.0.1:8000"
CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 4}


def operation(path: str) -> Operation:
    return next(one for one in load_operations() if one.path == path)


def replace_handler(monkeypatch: pytest.MonkeyPatch, handler: Any) -> None:
    monkeypatch.setattr("qwen2vl.server.serving.chat.create_chat_completion", handler)


def error_of(response: httpx2.Response) -> dict[str, Any]:
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    return body["error"]


def test_a_request_is_answered(app_client: TestClient) -> None:
    response = app_client.post(CHAT, json=HI)
    assert response.status_code == 200
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.json()["choices"][0]["message"]["content"]


def test_the_answer_can_be_streamed(app_client: TestClient) -> None:
    plain = app_client.post(CHAT, json=HI).json()["choices"][0]["message"]["content"]
    response = app_client.post(CHAT, json=HI | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    deltas = [choice["delta"].get("content") or "" for c in chunks for choice in c["choices"]]
    assert "".join(deltas) == plain


@pytest.mark.parametrize("path", ["/v1", "/v1/chat", "/v1/chat/completions/", "/docs", "/%00"])
def test_unknown_routes(app_client: TestClient, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        response = app_client.request(method, path)
        assert response.status_code == 404
        assert error_of(response)["code"] == "not_found"


@pytest.mark.parametrize(
    ("path", "other"),
    [
        ("/chat/completions", CHAT),
        ("/completions", "/v1/completions"),
        ("/models", "/v1/models"),
        ("/v1/v1/chat/completions", CHAT),
        ("/v1/chat/completions/", CHAT),
        ("/v1/tokenize", "/tokenize"),
        ("/nothing", None),
    ],
)
def test_a_route_without_its_prefix(app_client: TestClient, path: str, other: str | None) -> None:
    response = app_client.post(path, json=HI)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (404, "not_found")
    remedy = f"; did you mean {other}?" if other else "there is no such route"
    assert error["message"].endswith(remedy)


def test_version_and_ping(make_state: StateMaker) -> None:
    """The version needs the key; /ping is /health, also by POST."""
    client = TestClient(create_app(make_state(api_keys=("key",))), base_url=URL)
    response = client.get("/version", headers={"Authorization": "Bearer key"})
    assert response.json() == {"version": qwen2vl.__version__}
    refused = client.get("/version")
    assert refused.status_code == 401 and qwen2vl.__version__ not in refused.text
    for method in ("GET", "POST"):
        response = client.request(method, "/ping")
        assert (response.status_code, response.content) == (200, b"")
    assert client.delete("/ping").status_code == 405
    assert client.post("/version", headers={"Authorization": "Bearer key"}).status_code == 405


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", CHAT, "POST"), ("POST", "/v1/models", "GET"), ("PUT", "/tokenize", "POST")],
)
def test_wrong_methods(app_client: TestClient, method: str, path: str, allowed: str) -> None:
    response = app_client.request(method, path)
    assert response.status_code == 405
    assert allowed in response.headers["allow"]
    assert error_of(response)["code"] == "method_not_allowed"


def test_the_form_of_refusals(app_client: TestClient) -> None:
    response = app_client.post(CHAT, json=HI | {"temprature": 1})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")
    assert "did you mean temperature?" in error["message"]
    response = app_client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415
    response = app_client.post(CHAT, content=b"{", headers={"Content-Type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")


def test_models(app_client: TestClient) -> None:
    listed = app_client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["nano"]
    assert app_client.get("/v1/models/nano").json() == listed["data"][0]
    response = app_client.get("/v1/models/nan")
    assert response.status_code == 404
    error = error_of(response)
    assert error["code"] == "model_not_found" and "did you mean nano?" in error["message"]


def test_names_with_a_slash(make_state: StateMaker) -> None:
    name = "Qwen/Qwen2-VL-2B-Instruct"
    client = TestClient(create_app(make_state(served_model_names=(name, "gpt-4o"))), base_url=URL)
    assert client.get(f"/v1/models/{name}").json()["id"] == name
    assert client.post(CHAT, json=HI | {"model": "gpt-4o"}).status_code == 200
    assert client.post(CHAT, json=HI | {"model": "nano"}).status_code == 404


def test_a_full_queue_is_refused_with_retry_after(make_state: StateMaker) -> None:
    state = make_state()
    state.admission = Admission(max_running=1, max_queue=0, on_reject=state.metrics.reject)
    client = TestClient(create_app(state), base_url=URL)
    with state.admission.enter():
        response = client.post(CHAT, json=HI)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert error_of(response)["type"] == "rate_limit_error"
    assert (
        'qwen2vl:rejected_total{model_name="nano",reason="queue_full"} 1.0'
        in client.get("/metrics").text
    )
    assert client.post(CHAT, json=HI).status_code == 200


def test_slots_and_bytes_are_returned(make_state: StateMaker) -> None:
    state = make_state()
    client = TestClient(create_app(state), base_url=URL)
    bodies: list[dict[str, Any]] = [HI, HI | {"stream": True}, HI | {"n": 99}, {}]
    for body in bodies:
        client.post(CHAT, json=body)
        assert state.admission.num_requests == 0


def test_an_internal_error_is_logged_and_not_told(
    make_state: StateMaker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(*_: object) -> None:
        raise RuntimeError("a secret text")

    replace_handler(monkeypatch, handler)
    client = TestClient(create_app(make_state()), base_url=URL)
    response = client.post(CHAT, json=HI, headers={"X-Request-Id": "abc"})
    assert response.status_code == 500
    assert "secret" not in response.text and "request id abc" in response.text
    assert "a secret text" in caplog.text


def test_a_request_has_a_time_limit(
    make_state: StateMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    canceled: list[bool] = []

    async def handler(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            canceled.append(True)

    replace_handler(monkeypatch, handler)
    client = TestClient(create_app(make_state(request_timeout=0.02)), base_url=URL)
    response = client.post(CHAT, json=HI)
    assert response.status_code == 504
    assert error_of(response)["code"] == "request_timeout"
    assert canceled == [True]


def test_a_stream_has_a_time_limit(make_state: StateMaker) -> None:
    client = TestClient(create_app(make_state(request_timeout=0.3)), base_url=URL)
    body = HI | {"max_tokens": 4000, "ignore_eos": True, "stream": True}
    events = client.post(CHAT, json=body).text.strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "request_timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(live_server: LiveServer, stream: bool) -> None:
    body = HI | {"max_tokens": 4000, "ignore_eos": True, "stream": stream}
    state = live_server.state
    with httpx2.Client(base_url=live_server.base_url, timeout=60) as client:
        request = client.build_request("POST", CHAT, json=body)
        if stream:
            response = client.send(request, stream=True)
            next(response.iter_bytes())
            response.close()
        else:
            with pytest.raises(httpx2.ReadTimeout):
                client.post(CHAT, json=body, timeout=httpx2.Timeout(60, read=0.3))
    wait_until(lambda: state.engine.stats().num_running == 0)
    wait_until(lambda: state.admission.num_requests == 0)


def test_a_client_that_leaves_is_logged_as_499(start_server: ServerStarter) -> None:
    server = start_server()
    body = HI | {"max_tokens": 4000, "ignore_eos": True}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(server.base_url + CHAT, json=body, timeout=httpx2.Timeout(60, read=0.2))
    wait_until(lambda: 'status="499"' in server.state.metrics.expose().decode())


def test_metrics_can_have_a_port_of_their_own(make_state: StateMaker) -> None:
    state = make_state(metrics_port=9000, api_keys=("key",))
    headers = {"Authorization": "Bearer key"}
    main = TestClient(create_app(state), base_url=URL, headers=headers)
    assert main.get("/metrics").status_code == 404
    other = TestClient(create_metrics_app(state), base_url=URL)
    assert other.get("/metrics").status_code == 401
    assert other.get("/metrics", headers={"Host": "evil.example"}).status_code == 403
    response = other.get("/metrics", headers=headers)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "qwen2vl:num_requests_running" in response.text
    assert other.get(CHAT, headers=headers).status_code == 404


def test_head_requests_have_no_body(app_client: TestClient) -> None:
    response = app_client.head("/v1/models")
    assert (response.status_code, response.content) == (200, b"")
