"""Draining: running requests finish, new ones are refused, and the rest is aborted in time."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from qwen2vl.engine import AsyncLLM
from tests.server.conftest import LiveServer, ServerStarter, wait_until

BODY = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "ignore_eos": True}
NUM_TOKENS = 600  # of a request that still runs while others are refused


class Call:
    """A request in a thread of its own."""

    def __init__(self, server: LiveServer, **body: Any) -> None:
        self.url = server.base_url + "/v1/chat/completions"
        self.body = BODY | body
        self.response: httpx2.Response | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.response = httpx2.post(self.url, json=self.body, timeout=60)

    def result(self) -> httpx2.Response:
        self.thread.join(60)
        assert self.response is not None
        return self.response


def is_running(server: LiveServer, count: int = 1) -> Callable[[], bool]:
    return lambda: server.state.engine.stats().num_running >= count


def test_running_requests_finish_and_new_ones_are_refused(start_server: ServerStarter) -> None:
    server = start_server()
    with httpx2.Client(base_url=server.base_url) as client:
        assert client.get("/ready").status_code == 200
        calls = [Call(server, max_tokens=NUM_TOKENS, stream=stream) for stream in (False, True)]
        wait_until(is_running(server, 2))
        server.server.handle_exit(15, None)
        wait_until(lambda: server.state.is_draining)
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        refused = httpx2.post(calls[0].url, json=BODY | {"max_tokens": 1})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
    plain, streamed = (call.result() for call in calls)
    assert plain.status_code == streamed.status_code == 200
    assert plain.json()["usage"]["completion_tokens"] == NUM_TOKENS
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert "error" not in streamed.text
    wait_until(lambda: not server.server.servers[0].is_serving())
    assert not server.server.force_exit


def test_what_arrived_before_the_signal_is_accepted(start_server: ServerStarter) -> None:
    server = start_server()
    body = json.dumps(BODY | {"max_tokens": 5}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(head.encode() + body)
        server.server.handle_exit(15, None)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("signals", [1, 2])
def test_the_rest_is_aborted(
    start_server: ServerStarter,
    async_llm: AsyncLLM,
    signals: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After the time limit, or at once with a second signal; neither logs a traceback."""
    server = start_server(shutdown_timeout=0.2 if signals == 1 else 1000.0)
    try:
        calls = [Call(server, max_tokens=4000, stream=stream) for stream in (False, True)]
        wait_until(is_running(server, 2))
        for _ in range(signals):
            server.server.handle_exit(15, None)
        plain, streamed = (call.result() for call in calls)
        wait_until(server.server.lifespan.shutdown_event.is_set)
    finally:
        # The engine is closed before the calls end; another server of this process may have
        # restarted it meanwhile.
        async_llm.restart()
    assert server.server.forcing_signal == (15 if signals == 2 else None)
    assert "Traceback" not in caplog.text
    assert plain.status_code == 503
    assert plain.json()["error"]["code"] == "shutting_down"
    events = streamed.text.strip().split("\n\n")
    error = json.loads(events[-2].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "shutting_down")
    assert "the server shut down before the request was finished" in error["message"]
    assert events[-1] == "data: [DONE]"
