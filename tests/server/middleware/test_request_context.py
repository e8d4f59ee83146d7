"""Request ids, the access log, HTTP metrics, and errors that nobody caught."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen2vl.server.app import create_app
from qwen2vl.server.middleware.request_context import ACCESS_LOGGER
from tests.server.conftest import StateMaker

URL = "http://127.0.0.1:8000"
SECRET = "a-secret-text"


@pytest.fixture
def client(make_state: StateMaker, caplog: pytest.LogCaptureFixture) -> TestClient:
    caplog.set_level(logging.INFO, ACCESS_LOGGER)
    logging.getLogger(ACCESS_LOGGER).propagate = True
    return TestClient(create_app(make_state()), base_url=URL)


def access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == ACCESS_LOGGER]


@pytest.mark.parametrize("given", ["abc", "req-1.2_3", "a" * 64])
def test_a_safe_id_is_kept(client: TestClient, given: str) -> None:
    response = client.get("/ready", headers={"X-Request-Id": given})
    assert response.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "a" * 65, "<script>", 'a"b', "é", "a;b"])
def test_another_id_is_replaced(client: TestClient, given: str) -> None:
    response = client.get("/ready", headers={"X-Request-Id": given.encode()})  # type: ignore[dict-item]
    assert re.fullmatch("req-[0-9a-f]{24}", response.headers["x-request-id"])


def test_ids_are_new_each_time(client: TestClient) -> None:
    assert len({client.get("/ready").headers["x-request-id"] for _ in range(5)}) == 5


def test_the_log_has_no_contents(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    client.post(
        f"/tokenize?key={SECRET}",
        json={"prompt": SECRET},
        headers={"Authorization": f"Bearer {SECRET}", "X-Request-Id": "abc", "Cookie": SECRET},
    )
    (line,) = access_lines(caplog)
    assert re.fullmatch(r"POST '/tokenize' 200 [0-9.]+ ms request_id=abc", line)
    assert SECRET not in caplog.text


def test_the_log_has_the_tokens(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "ignore_eos": True}
    for stream in (False, True):
        client.post("/v1/chat/completions", json={**body, "stream": stream})
    for line in access_lines(caplog):
        assert re.search(r" prompt_tokens=\d+ completion_tokens=2 request_id=", line)


def test_a_path_cannot_forge_a_line(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    client.get("/%0aPOST%20/v1%1b[31m" + "a" * 3000)
    (line,) = access_lines(caplog)
    assert "\n" not in line and "\x1b" not in line and len(line) < 250


def test_json_lines(make_state: StateMaker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, ACCESS_LOGGER)
    logging.getLogger(ACCESS_LOGGER).propagate = True
    client = TestClient(create_app(make_state(log_format="json")), base_url=URL)
    client.get("/none%1b", headers={"X-Request-Id": "abc"})
    (line,) = access_lines(caplog)
    fields = json.loads(line)
    assert fields["status"] == 404 and fields["request_id"] == "abc" and fields["method"] == "GET"
    assert fields.keys() == {"time", "method", "path", "status", "ms", "request_id"}


def test_the_log_can_be_disabled(make_state: StateMaker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, ACCESS_LOGGER)
    client = TestClient(create_app(make_state(access_log=False)), base_url=URL)
    client.get("/ready")
    assert not access_lines(caplog)


def test_requests_are_counted_by_route(make_state: StateMaker) -> None:
    state = make_state()
    client = TestClient(create_app(state), base_url=URL)
    for path in ("/v1/models/nano", "/v1/models/none", "/.env", "/wp-admin"):
        client.get(path)
    text = state.metrics.expose().decode()
    route = 'method="GET",model_name="nano",route="/v1/models/{model:path}"'
    assert f'qwen2vl:http_requests_total{{{route},status="200"}} 1.0' in text
    assert f'qwen2vl:http_requests_total{{{route},status="404"}} 1.0' in text
    assert 'route="other",status="404"} 2.0' in text
    assert ".env" not in text


def test_an_uncaught_error_is_a_500_without_its_text(
    make_state: StateMaker, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(make_state())

    async def endpoint(_: Any) -> Any:
        raise RuntimeError(SECRET)

    app.add_route("/bug", endpoint)
    client = TestClient(app, base_url=URL)
    response = client.get("/bug", headers={"X-Request-Id": "abc"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "request id abc" in response.json()["error"]["message"]
    assert SECRET not in response.text
    assert SECRET in caplog.text  # with its traceback
    assert client.get("/ready").status_code == 200


def test_a_long_method_is_cut(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    response = client.request("A" * 5000, "/ready")
    assert response.status_code == 405 and len(response.text) < 500
    assert len(access_lines(caplog)[0]) < 200
