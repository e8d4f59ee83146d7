"""Clients that are slow, huge, many, strangers, or leave: the others do not notice."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from qwen2vl.server.app import create_app
from qwen2vl.server.middleware.access_control import PUBLIC_PATHS
from qwen2vl.server.page.routes import PAGE_PATHS
from tests.media import encoded, encoded_video, noise, smooth
from tests.server.bad_inputs.suite import (
    CANARY,
    CHAT,
    Suite,
    check_safe,
    covers,
    image_item,
    text_item,
    video_item,
)
from tests.server.conftest import LiveServer, ServerStarter, wait_until
from tests.server.media.evil_server import EvilServer

HELLO = [{"role": "user", "content": "hello"}]


def request_bytes(body: Any, path: str = CHAT, headers: str = "") -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n{headers}\r\n"
    )
    return head.encode() + content


def connect(live: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout=20)


def receive_status(sock: socket.socket) -> int:
    """Return the status of the response, or 0 if the connection was closed instead."""
    data = b""
    try:
        while b"\r\n" not in data:
            if not (chunk := sock.recv(4096)):
                return 0
            data += chunk
    except ConnectionError:
        return 0
    return int(data.split(b" ", 2)[1])


def is_idle(live: LiveServer) -> bool:
    stats = live.state.engine.stats()
    admission = live.state.admission
    return not (stats.num_running or stats.num_waiting or admission.num_requests)


def long_body(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": 3000, "ignore_eos": True, "temperature": 0, **fields}


# Access ------------------------------------------------------------------------------------------


@covers("missing/invalid API key on every route incl. non-/v1")
def test_every_route_needs_the_key(make_state: Callable[..., Any]) -> None:
    app = create_app(make_state(api_keys=("secret-key", "other-key")))
    wrong: list[dict[str, str]] = [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "secret-key"},
        {"authorization": "Basic secret-key"},
        {"authorization": "Bearer secret-key2"},
        {"authorization": "Bearer " + "x" * 5000},
        {"x-api-key": "wrong"},
    ]
    paths = [route.path.replace("{model:path}", "nano") for route in app.routes]  # pyright: ignore[reportAttributeAccessIssue]
    assert CHAT in paths and "/metrics" in paths and "/tokenize" in paths
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        for path in [*paths, "/nope", "/v1/nope", "//v1/models", "/v1/models/../../health", "/"]:
            for headers in wrong:
                for method in ("GET", "POST"):
                    response = client.request(method, path, headers=headers, json=None)
                    public = response.url.path in PUBLIC_PATHS | PAGE_PATHS
                    assert (response.status_code == 401) != public, (path, method)
                    assert "secret-key" not in response.text
        for name in ("secret-key", "other-key"):
            headers = {"authorization": f"Bearer {name}"}
            assert client.get("/v1/models", headers=headers).status_code == 200


@covers("prefix or vision cache timing/cross-user leak")
def test_keys_share_no_cache(make_state: Callable[..., Any]) -> None:
    app = create_app(make_state(api_keys=("first", "second")))
    content = [image_item(encoded(noise(112, 112, 5))), text_item("A long shared question. " * 20)]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:

        def cached(key: str) -> int:
            response = client.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})
            return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("first") == 0
        assert cached("first") > 0
        assert cached("second") == 0


@covers("cross-origin page calls local server")
def test_pages_of_other_sites(suite: Suite) -> None:
    body = {"messages": HELLO, "max_tokens": 1}
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:9999"},
        {"host": "evil.example"},
        {"host": "localhost.evil.example"},
        {"host": "evil.example:8000", "origin": "http://evil.example:8000"},
    ):
        response = suite.client.post(CHAT, json=body, headers=headers)
        assert response.status_code == 403, headers
        assert "access-control-allow-origin" not in response.headers
        check_safe(response.json()["error"]["message"])
    preflight = suite.client.options(
        CHAT,
        headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
    )
    assert preflight.status_code == 403
    assert "access-control-allow-origin" not in preflight.headers


# Size and time -----------------------------------------------------------------------------------


@covers("1 MB header / 100k headers")
@pytest.mark.parametrize(
    "headers", ["X-Filler: " + "x" * 2**20 + "\r\n", "X-A: b\r\n" * 100_000], ids=["long", "many"]
)
def test_huge_headers(live_server: LiveServer, headers: str) -> None:
    with closing(connect(live_server)) as sock:
        try:
            sock.sendall(request_bytes({"messages": HELLO}, headers=headers))
        except ConnectionError:
            return
        assert receive_status(sock) in (0, 400, 431)


@covers("slow-loris request body or reading response 1 B/s")
def test_slow_clients(start_server: ServerStarter) -> None:
    live = start_server(header_timeout=0.4, body_timeout=0.4, write_timeout=0.4)
    request = request_bytes({"messages": HELLO, "max_tokens": 1})
    head = request.partition(b"\r\n\r\n")[0]
    with closing(connect(live)) as in_head, closing(connect(live)) as in_body:
        in_head.sendall(head[:20])
        in_body.sendall(head + b"\r\n\r\n{")
        response = httpx2.post(live.base_url + CHAT, json={"messages": HELLO, "max_tokens": 1})
        assert response.status_code == 200  # meanwhile
        assert receive_status(in_head) in (0, 408)
        assert receive_status(in_body) == 408
    wait_until(lambda: is_idle(live))


@covers("body over limit, chunked without length")
def test_endless_chunked_body(start_server: ServerStarter) -> None:
    live = start_server(max_body_bytes=100_000)
    head = request_bytes({}).partition(b"\r\nContent-Length")[0]
    with closing(connect(live)) as sock:
        sock.sendall(head + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
        sent = 0
        try:
            while sent < 200_000:
                sock.sendall(chunk)
                sent += 0x2000
        except ConnectionError:
            pass
        assert receive_status(sock) in (0, 413)
    response = httpx2.post(
        live.base_url + CHAT, content=b" " * 200_000, headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    check_safe(response.json()["error"]["message"])


# Clients that leave ------------------------------------------------------------------------------


@covers("client disconnects mid-stream", "client disconnects on non-stream request")
@pytest.mark.parametrize("stream", [True, False])
def test_client_leaves_while_tokens_are_generated(live_server: LiveServer, stream: bool) -> None:
    used = live_server.state.engine.stats().kv_cache_usage
    sock = connect(live_server)
    sock.sendall(request_bytes(long_body(stream=stream)))
    if stream:
        assert receive_status(sock) == 200
    wait_until(lambda: live_server.state.engine.stats().num_running)
    sock.close()
    wait_until(lambda: is_idle(live_server))
    assert live_server.state.engine.stats().kv_cache_usage <= used + 0.05


@covers("disconnect during image fetch / decode / queue wait")
def test_client_leaves_while_media_are_fetched(start_server: ServerStarter) -> None:
    with EvilServer() as evil:
        live = start_server(allowed_media_domains=(f"127.0.0.1:{evil.port}",))
        content = [image_item(evil.url("/hang")), image_item(evil.url("/drip"))]
        sock = connect(live)
        sock.sendall(request_bytes({"messages": [{"role": "user", "content": content}]}))
        wait_until(lambda: evil.connections == 2)
        sock.close()
        wait_until(lambda: evil.open_connections == 0 and is_idle(live))


@covers("disconnect during image fetch / decode / queue wait")
def test_client_leaves_while_a_video_is_decoded(live_server: LiveServer) -> None:
    video = encoded_video(400, width=640, height=480, codec="mpeg4")
    content = [video_item(video, nframes=40, max_pixels=784 * 4)]
    sock = connect(live_server)
    sock.sendall(request_bytes({"messages": [{"role": "user", "content": content}]}))
    wait_until(lambda: live_server.state.admission.num_requests)
    sock.close()
    wait_until(lambda: is_idle(live_server))


@covers("disconnect during image fetch / decode / queue wait")
def test_client_leaves_while_it_waits_in_the_queue(live_server: LiveServer) -> None:
    running = [connect(live_server) for _ in range(16)]
    for sock in running:
        sock.sendall(request_bytes(long_body()))
    wait_until(lambda: live_server.state.engine.stats().num_running == 16)
    waiting = connect(live_server)
    waiting.sendall(request_bytes(long_body()))
    wait_until(lambda: live_server.state.engine.stats().num_waiting == 1)
    waiting.close()
    wait_until(lambda: live_server.state.engine.stats().num_waiting == 0)
    assert live_server.state.engine.stats().num_running == 16
    for sock in running:
        sock.close()
    wait_until(lambda: is_idle(live_server))


# Load --------------------------------------------------------------------------------------------


@covers("200 concurrent long requests then a short one")
def test_many_long_requests(start_server: ServerStarter) -> None:
    live = start_server(max_queue=24)
    sockets = [connect(live) for _ in range(200)]
    try:
        for sock in sockets:
            sock.sendall(request_bytes(long_body()))
        refused = 200 - 16 - 24
        wait_until(lambda: live.state.admission.num_requests == 40)
        start = time.monotonic()
        response = httpx2.post(live.base_url + CHAT, json={"messages": HELLO}, timeout=20)
        assert response.status_code == 429 and response.headers["retry-after"]
        check_safe(response.json()["error"]["message"])
        assert time.monotonic() - start < 5
        assert [receive_status(sock) for sock in sockets[40:]] == [429] * refused
    finally:
        for sock in sockets:
            sock.close()
    wait_until(lambda: is_idle(live))
    response = httpx2.post(live.base_url + CHAT, json={"messages": HELLO, "max_tokens": 1})
    assert response.status_code == 200


@covers("good and bad requests mixed in one batch")
def test_good_and_bad_requests_together(live_server: LiveServer, suite: Suite) -> None:
    fields = {"max_tokens": 12, "temperature": 0, "logprobs": True}
    good = [[{"role": "user", "content": f"Question {i}: what is {i}?"}] for i in range(4)] + list(
        CANARY
    )
    alone = [suite.chat(messages, **fields).body["choices"][0]["message"] for messages in good]
    damaged = image_item(encoded(smooth(56, 56))[:60])
    bad: list[dict[str, Any]] = [
        {"messages": HELLO, "stop_token_ids": [151645000]},
        {"messages": HELLO, "logit_bias": {"191222": -100}},
        {"messages": [{"role": "user", "content": [damaged]}]},
        {"messages": [{"role": "user", "content": "word " * 5000}]},
        {"messages": HELLO, "temperature": -1},
        {"messages": HELLO, "structured_outputs": {"regex": "("}},
    ]

    async def run() -> list[Any]:
        async with httpx2.AsyncClient(base_url=live_server.base_url, timeout=60) as client:
            bodies = [
                body
                for messages, wrong in zip(good, bad, strict=True)
                for body in ({"messages": messages, "ignore_eos": True, **fields}, wrong)
            ]
            return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies * 2))

    responses = asyncio.run(run())
    assert [r.status_code for r in responses] == [200, 400] * (len(good) * 2)
    for index, response in enumerate(responses[::2]):
        assert response.json()["choices"][0]["message"] == alone[index % len(good)]
