"""Host, Origin and API keys, on every route and spelling of a path."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen2vl.server.app import create_app
from qwen2vl.server.middleware.access_control import ApiKeys, host_name, is_loopback
from qwen2vl.server.state import Caller
from tests.server.conftest import StateMaker

URL = "http://127.0.0.1:8000"
KEYS = ("first-key", "second-key")
PATHS = [
    *("/v1/models", "/v1/models/nano", "/metrics", "/openapi.json", "/docs", "/none", "/v1"),
    *("/health/", f"{URL}//health", "/HEALTH", "/ready/..%2fv1/models", "/health%2f.."),
    "/v1/./models",
]
POSTS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/none"]


@pytest.fixture
def client(make_state: StateMaker) -> TestClient:
    return TestClient(create_app(make_state()), base_url=URL)


@pytest.fixture
def locked(make_state: StateMaker) -> TestClient:
    return TestClient(create_app(make_state(api_keys=KEYS)), base_url=URL)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# Keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_every_path_needs_a_key(locked: TestClient, path: str) -> None:
    response = locked.get(path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")


@pytest.mark.parametrize("path", POSTS)
def test_every_operation_needs_a_key(locked: TestClient, path: str) -> None:
    assert locked.post(path, json={}).status_code == 401
    assert locked.post(path, json={}, headers=bearer("wrong")).status_code == 401
    assert locked.post(path, json={}, headers=bearer("second-key")).status_code in (400, 404)


def test_health_needs_no_key_and_tells_nothing(locked: TestClient) -> None:
    for path in ("/health", "/ping", "/ready"):
        response = locked.get(path)
        assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (bearer("first-key"), 200),
        (bearer("second-key"), 200),
        ({"authorization": "bearer first-key"}, 200),
        ({"X-Api-Key": "first-key"}, 200),
        (bearer(""), 401),
        (bearer("first-ke"), 401),
        (bearer("first-keyy"), 401),
        (bearer("FIRST-KEY"), 401),
        (bearer("first-key second-key"), 401),
        ({"Authorization": "first-key"}, 401),
        ({"Authorization": "Basic first-key"}, 401),
        ({"X-Api-Key": "wrong"}, 401),
        (bearer("a" * 9000), 401),
    ],
)
def test_keys(locked: TestClient, headers: dict[str, str], status: int) -> None:
    assert locked.get("/v1/models", headers=headers).status_code == status


def test_a_key_sent_twice_is_refused(locked: TestClient) -> None:
    headers = [("Authorization", "Bearer wrong"), ("Authorization", "Bearer first-key")]
    assert locked.get("/v1/models", headers=headers).status_code == 401  # type: ignore[arg-type]


def test_all_keys_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(first: bytes, second: bytes) -> bool:
        compared.append(second)
        return first == second

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = ApiKeys(["a", "b", "c"])
    assert keys.find(b"a") == 0
    assert len(compared) == 3
    assert keys.find(b"d") is None
    assert len(compared) == 6
    assert all(len(digest) == 32 for digest in compared)


def test_salts_differ_between_keys_and_processes() -> None:
    keys = ApiKeys(["a", "b"])
    assert len({keys.cache_salt(0), keys.cache_salt(1), ApiKeys(["a", "b"]).cache_salt(0)}) == 3
    assert keys.cache_salt(0) == keys.cache_salt(0)
    assert len(keys.cache_salt(0)) == 16
    assert ApiKeys(["a"]).cache_salt(0) == b""


def test_the_caller_of_a_request_has_the_salt_of_its_key(make_state: StateMaker) -> None:
    app = create_app(make_state(api_keys=KEYS))
    callers: list[Caller] = []

    async def endpoint(request: Any) -> Any:
        callers.append(request.scope["state"]["caller"])
        from starlette.responses import Response

        return Response()

    app.add_route("/caller", endpoint)
    client = TestClient(app, base_url=URL)
    for key in (*KEYS, KEYS[0]):
        client.get("/caller", headers={**bearer(key), "X-Request-Id": "abc"})
    first, second, again = callers
    assert first.cache_salt == again.cache_salt != second.cache_salt
    assert {caller.request_id for caller in callers} == {"abc"}


# Host ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("127.1.2.3", 200),
        ("localhost:9", 200),
        ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("192.168.0.1", 403),
        ("evil.example:80@127.0.0.1", 400),
        ("127.0.0.1/evil", 400),
        ("127.0.0.1:x", 400),
        ("", 400),
        ("[::1", 400),
        ("localhost\\", 400),
    ],
)
def test_hosts(client: TestClient, host: str, status: int) -> None:
    response = client.get("/ready", headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "host_not_allowed"
        assert "--allowed-hosts" in response.json()["error"]["message"]


def test_a_host_sent_twice_is_refused(client: TestClient) -> None:
    headers = [("Host", "127.0.0.1"), ("Host", "evil.example")]
    assert client.get("/ready", headers=headers).status_code == 400  # type: ignore[arg-type]


def test_the_bound_and_the_allowed_hosts_are_accepted(make_state: StateMaker) -> None:
    state = make_state(host="10.0.0.5", allowed_hosts=("gpu.example", "[fd00::1]"))
    client = TestClient(create_app(state), base_url=URL)
    for host in ("10.0.0.5:8000", "gpu.example", "GPU.example:443", "[fd00::1]:8000", "localhost"):
        assert client.get("/ready", headers={"Host": host}).status_code == 200
    assert client.get("/ready", headers={"Host": "10.0.0.6"}).status_code == 403


def test_all_addresses_means_the_one_that_was_reached(make_state: StateMaker) -> None:
    app = create_app(make_state(host="0.0.0.0"))
    client = TestClient(app, base_url="http://192.0.2.7:8000")  # the server's, for the test client
    assert client.get("/ready").status_code == 200
    assert client.get("/ready", headers={"Host": "rebound.example"}).status_code == 403


def test_host_names() -> None:
    assert host_name(b"Example.COM.:80") == "example.com"
    assert host_name(b"[::1]x") is None
    assert is_loopback("127.0.0.53") and not is_loopback("127.evil.example")


# Origin -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "file://", "http://127.0.0.1"])
def test_a_foreign_origin_is_refused(client: TestClient, origin: str) -> None:
    """The last is the same address, but another port: another program's page."""
    for response in (
        client.get("/ready", headers={"Origin": origin}),
        client.post("/tokenize", json={"prompt": "a"}, headers={"Origin": origin}),
        client.options(
            "/tokenize", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
        ),
    ):
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in response.headers


def test_the_servers_own_origin_is_accepted(client: TestClient) -> None:
    response = client.get("/ready", headers={"Origin": URL})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


@pytest.fixture
def open_client(make_state: StateMaker) -> TestClient:
    state = make_state(allowed_origins=("https://app.example",), api_keys=("key",))
    return TestClient(create_app(state), base_url=URL)


def test_an_allowed_origin_gets_cors_headers(open_client: TestClient) -> None:
    headers = {"Origin": "https://app.example", **bearer("key")}
    response = open_client.get("/v1/models", headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert response.headers["vary"] == "origin, access-control-request-headers"
    refused = open_client.get("/v1/models", headers={"Origin": "https://app.example"})
    assert refused.status_code == 401  # readable by the page
    assert refused.headers["access-control-allow-origin"] == "https://app.example"


def test_a_preflight_needs_no_key(open_client: TestClient) -> None:
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    response = open_client.options("/v1/chat/completions", headers=headers)
    assert response.status_code == 204
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "content-type" in response.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in response.headers


FIXED_HEADERS = "authorization, content-type, x-request-id, x-api-key"


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (  # OpenAI's JavaScript client in a browser
            "authorization,content-type,x-stainless-arch,x-stainless-retry-count",
            "authorization, content-type, x-stainless-arch, x-stainless-retry-count",
        ),
        ("X-Custom", "X-Custom"),
        (None, FIXED_HEADERS),
        ("", FIXED_HEADERS),
        ("a,,b", FIXED_HEADERS),
        ("a b", FIXED_HEADERS),
        ("a\xe9", FIXED_HEADERS),
        ("a: b", FIXED_HEADERS),
    ],
)
def test_a_preflight_may_ask_for_any_header(
    open_client: TestClient, asked: str | None, allowed: str
) -> None:
    headers: dict[str, str | bytes] = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
    }
    if asked is not None:
        headers["Access-Control-Request-Headers"] = asked.encode("latin-1")
    response = open_client.options("/v1/chat/completions", headers=headers)  # type: ignore[arg-type]
    assert (response.status_code, response.headers["access-control-allow-headers"]) == (
        204,
        allowed,
    )
    foreign = open_client.options(
        "/v1/chat/completions",
        headers={**headers, "Origin": "https://evil.example"},  # type: ignore[arg-type]
    )
    assert foreign.status_code == 403
    assert "access-control-allow-headers" not in foreign.headers


def test_any_origin_can_be_allowed(make_state: StateMaker) -> None:
    client = TestClient(create_app(make_state(allowed_origins=("*",))), base_url=URL)
    assert client.get("/ready", headers={"Origin": "null"}).status_code == 200


def test_a_body_of_two_lengths_ends_the_connection(start_server: Any) -> None:
    live = start_server(api_keys=KEYS)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer first-key\r\n"
    lengths = "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    smuggled = head.replace("POST /v1/completions", "GET /v1/models") + "\r\n"
    with socket.create_connection(("127.0.0.1", live.port), 10) as sock:
        sock.sendall((head + lengths + smuggled).encode())
        received = b""
        while data := sock.recv(65_536):
            received += data
    assert received.startswith(b"HTTP/1.1 400") and received.count(b"HTTP/1.1") == 1
    assert b"both Content-Length and Transfer-Encoding" in received
