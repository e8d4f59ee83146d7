"""Fixtures of the server's tests: one nano engine a process, in float32, behind an application.

`server_state` is shared: what a test changes in it, it puts back. `app_client` calls the
application in this process; `live_server` listens on a loopback port, for tests of connections and
of official clients. `make_state` builds a state of other configuration on the same engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen2vl.engine import LLM, AsyncLLM
from qwen2vl.processor.media.decoder import LOCAL_DECODER
from qwen2vl.server.app import create_app
from qwen2vl.server.config import ServerConfig
from qwen2vl.server.launch import build_server, build_state, prepare_llm
from qwen2vl.server.listener.http_server import HTTPServer
from qwen2vl.server.listener.sockets import open_socket
from qwen2vl.server.state import ServerState

StateMaker = Callable[..., ServerState]

START_SECONDS = 120.0  # also to stop: other programs may use the processors


@pytest.fixture(scope="session")
def async_llm() -> Iterator[AsyncLLM]:
    """Give nano in float32, in an engine thread; its processor is that of a server."""
    with LLM("nano", dtype="float32", device="cpu") as llm:
        prepare_llm(llm, ServerConfig(), LOCAL_DECODER)
        engine = AsyncLLM(llm)
        yield engine
        engine.close()


@pytest.fixture
def make_state(async_llm: AsyncLLM) -> StateMaker:
    """Give a function: `make_state(max_queue=1)` is a state of that ServerConfig."""
    return lambda **config: build_state(async_llm, ServerConfig(**config))


@pytest.fixture(scope="session")
def server_state(async_llm: AsyncLLM) -> ServerState:
    """Give a state of the default configuration."""
    return build_state(async_llm, ServerConfig())


@pytest.fixture(scope="session")
def app_client(server_state: ServerState) -> Iterator[TestClient]:
    """Give a client of the application in this process; httpx2's methods: get, post, stream."""
    with TestClient(create_app(server_state), base_url="http://127.0.0.1:8000") as client:
        yield client


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A server that listens on a loopback port."""

    base_url: str  # "http://127.0.0.1:PORT", without /v1
    port: int
    state: ServerState
    server: HTTPServer


ServerStarter = Callable[..., LiveServer]


class _Running:
    def __init__(self, state: ServerState) -> None:
        socket = open_socket("127.0.0.1", 0)
        port = socket.getsockname()[1]
        server = build_server(state)
        self._thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
        self._thread.start()
        self.live = LiveServer(f"http://127.0.0.1:{port}", port, state, server)
        wait_until(lambda: server.started, START_SECONDS)

    def stop(self) -> None:
        self.live.server.should_exit = True
        self._thread.join(START_SECONDS)
        assert not self._thread.is_alive()


@contextmanager
def running_server(state: ServerState) -> Iterator[LiveServer]:
    """Run the server of a state in a thread while the context lasts."""
    running = _Running(state)
    try:
        yield running.live
    finally:
        running.stop()


@pytest.fixture(scope="session")
def live_server(async_llm: AsyncLLM) -> Iterator[LiveServer]:
    """Give a server of the default configuration, uvicorn in a thread; `live_server.base_url`."""
    running = _Running(build_state(async_llm, ServerConfig()))
    yield running.live
    running.stop()


@pytest.fixture
def start_server(async_llm: AsyncLLM) -> Iterator[ServerStarter]:
    """Give a function: `start_server(api_keys=("k",))` listens with that ServerConfig."""
    started: list[_Running] = []

    def start(**config: Any) -> LiveServer:
        started.append(_Running(build_state(async_llm, ServerConfig(**config))))
        return started[-1].live

    yield start
    for running in started:
        running.stop()


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Poll until a condition holds; fail after a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.005)
