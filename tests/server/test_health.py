"""/health and /ready, and the restart of an engine that died."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from qwen2vl.engine import AsyncLLM
from qwen2vl.errors import EngineError
from qwen2vl.server import health
from qwen2vl.server.app import create_app
from qwen2vl.server.config import ServerConfig
from qwen2vl.server.state import ServerState
from tests.server.conftest import ServerStarter, StateMaker, wait_until


def fake_state(**llm: Any) -> ServerState:
    engine: Any = SimpleNamespace(**{"is_alive": True, "seconds_in_step": 0.0} | llm)
    nothing: Any = SimpleNamespace(count_restart=lambda: None, is_draining=False)
    config = ServerConfig(engine_timeout=10.0)
    return ServerState(
        engine=engine, config=config, metrics=nothing, admission=nothing, connector=nothing
    )


@pytest.mark.parametrize(
    ("is_alive", "seconds", "expected"),
    [(True, 0.0, True), (True, 9.9, True), (True, 10.1, False), (False, 0.0, False)],
)
def test_health_follows_the_heartbeat(is_alive: bool, seconds: float, expected: bool) -> None:
    assert health.is_healthy(fake_state(is_alive=is_alive, seconds_in_step=seconds)) == expected


def test_statuses(make_state: StateMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state()
    client = TestClient(create_app(state), base_url="http://127.0.0.1:8000")

    def statuses() -> tuple[int, int]:
        return client.get("/health").status_code, client.get("/ready").status_code

    assert statuses() == (200, 200)
    state.admission.is_draining = True
    assert statuses() == (200, 503)
    state.admission.is_draining = False
    monkeypatch.setattr(AsyncLLM, "seconds_in_step", 1000.0)
    assert statuses() == (503, 503)


def test_an_engine_that_died_is_restarted(
    start_server: ServerStarter, async_llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests get an error, and the next one is answered."""
    server = start_server()
    url = server.base_url + "/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 0}
    expected = httpx2.post(url, json=body).json()["choices"]
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise RuntimeError("a secret text")

        patch.setattr("qwen2vl.engine.engine_core.EngineCore.step", fail)
        response = httpx2.post(url, json=body)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_error"
        assert "secret" not in response.text
    wait_until(lambda: server.state.engine.is_alive)
    assert httpx2.get(server.base_url + "/health").status_code == 200
    assert httpx2.post(url, json=body).json()["choices"] == expected


def test_restarts_are_counted() -> None:
    restarts: list[str] = []
    state = fake_state(is_alive=False, restart=lambda: restarts.append("engine"))
    state.metrics.count_restart = lambda: restarts.append("metric")  # type: ignore[method-assign]

    async def sleep(_: float) -> None:
        if restarts:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(health.restart_dead_engine(state, sleep))
    assert restarts == ["engine", "metric"]


def test_an_engine_that_keeps_dying_is_restarted_less_often() -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 5:
            raise asyncio.CancelledError

    def restart() -> None:
        raise EngineError("the LLM is in use")

    state = fake_state(is_alive=False, restart=restart)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(health.restart_dead_engine(state, sleep))
    assert pauses == [health.POLL_SECONDS * 2**index for index in range(5)]
