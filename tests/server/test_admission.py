"""Admission: limits of requests and keys, Retry-After, and draining."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from qwen2vl.server.admission import Admission
from qwen2vl.server.errors import APIError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_beyond_the_queue_are_refused() -> None:
    reasons: list[str] = []
    admission = Admission(max_running=2, max_queue=1, on_reject=reasons.append)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(admission.enter())
        with pytest.raises(APIError) as caught, admission.enter():
            pass
        error = caught.value
        assert (error.status, error.code) == (429, "rate_limit_exceeded")
        assert error.retry_after is not None and error.retry_after >= 1
        assert "3 requests run or wait" in str(error) and "--max-queue" in str(error)
        assert admission.num_requests == 3
    assert admission.num_requests == 0
    assert reasons == ["queue_full"]
    with admission.enter():
        assert admission.num_requests == 1


def test_a_failed_request_returns_its_slot() -> None:
    admission = Admission(max_running=1, max_queue=0)
    with pytest.raises(ZeroDivisionError), admission.enter():
        raise ZeroDivisionError
    with admission.enter():
        pass


def test_a_key_has_its_own_limit() -> None:
    reasons: list[str] = []
    admission = Admission(max_running=8, max_queue=8, max_per_key=2, on_reject=reasons.append)
    with admission.enter(b"a"), admission.enter(b"a"):
        with pytest.raises(APIError, match="key has 2 requests") as caught, admission.enter(b"a"):
            pass
        assert caught.value.status == 429
        with admission.enter(b"b"):
            assert admission.num_requests == 3
    assert reasons == ["key_limit"]
    assert not admission._num_of_key  # keys of the past take no memory


def test_draining_refuses_new_requests_only() -> None:
    admission = Admission(max_running=2, max_queue=0)
    with admission.enter():
        admission.is_draining = True
        with pytest.raises(APIError) as caught, admission.enter():
            pass
        assert (caught.value.status, caught.value.code) == (503, "shutting_down")
        assert admission.num_requests == 1


def test_retry_after_follows_the_duration_of_requests() -> None:
    clock = Clock()
    admission = Admission(max_running=1, max_queue=1, clock=clock)

    def retry_after() -> float:
        with (
            admission.enter(),
            admission.enter(),
            pytest.raises(APIError) as caught,
            admission.enter(),
        ):
            pass
        assert caught.value.retry_after is not None
        return caught.value.retry_after

    assert retry_after() == 1.0
    for _ in range(50):
        with admission.enter():
            clock.now += 20.0
    assert 15 < retry_after() < 25
    for _ in range(80):
        with admission.enter():
            clock.now += 1000.0
    assert retry_after() == 60.0


def test_a_request_that_arrives_takes_no_place_in_the_queue() -> None:
    admission = Admission(max_running=1, max_queue=0, max_per_key=2)
    with admission.receiving(b"a"), admission.receiving(b"a"):
        assert not admission.is_idle and admission.num_requests == 0
        with pytest.raises(APIError, match="key has 2 requests"), admission.receiving(b"a"):
            pass
        with admission.enter(b"b"):
            with pytest.raises(APIError, match="1 requests run"), admission.receiving(b"c"):
                pass  # refused before its body is read
            with pytest.raises(APIError, match="1 requests run"), admission.enter(has_arrived=True):
                pass
    assert admission.is_idle and not admission._num_of_key


def test_draining_finishes_what_has_begun_to_arrive() -> None:
    admission = Admission(max_running=1, max_queue=0)
    with admission.receiving():
        admission.is_draining = True
        with pytest.raises(APIError, match="shutting down"), admission.receiving():
            pass
    with admission.enter(has_arrived=True):
        assert not admission.is_idle
    assert admission.is_idle


def test_slow_clients_hold_no_place(start_server: Any) -> None:
    live = start_server(max_queue=0)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
    slow = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(40)]
    for sock in slow:
        sock.sendall(head + b'Content-Type: application/json\r\n\r\n{"mess')
    deadline = time.monotonic() + 10
    while live.state.admission.num_receiving < 40 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert live.state.admission.num_receiving == 40
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    response = httpx2.post(f"{live.base_url}/v1/chat/completions", json=body, timeout=20)
    assert response.status_code == 200
    for sock in slow:
        sock.close()
