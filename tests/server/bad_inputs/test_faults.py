"""Failures inside the server: memory, the engine, a decoding process, the process itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from qwen2vl.engine import AsyncLLM
from qwen2vl.errors import EngineError
from qwen2vl.processor.media_worker.pool import MediaWorkerPool
from tests.media import encoded, noise
from tests.server.bad_inputs.suite import CHAT, Suite, check_refusal, check_safe, covers, image_item
from tests.server.conftest import wait_until

ROOT = Path(__file__).resolve().parents[3]


def failing_forward(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, error: Exception, *, after: int = 0
) -> None:
    """Let every forward pass of the engine fail, from the one after `after` others on."""
    runner = suite.client.app.state.server.engine.llm.engine_core.runner
    left = [after]

    def failing(compute: Callable[..., Any]) -> Callable[..., Any]:
        def fail(*args: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise error
            left[0] -= 1
            return compute(*args, **options)

        return fail

    for name in ("_forward", "_decode"):
        monkeypatch.setattr(runner, name, failing(getattr(runner, name)))


@covers("OOM during prefill (too many image tokens)")
def test_out_of_memory(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = suite.client.app.state.server.engine
    used = engine.stats().kv_cache_usage
    with monkeypatch.context() as patch:
        failing_forward(suite, patch, torch.OutOfMemoryError("CUDA at 0x7f00deadbeef"))
        sent = suite.ask([image_item(encoded(noise(56, 84)))])
        check_refusal(sent, 400, "out of memory.*lower", sent.error["param"])
    assert engine.is_alive
    assert engine.stats().kv_cache_usage <= used + 0.05
    suite.accepted([image_item(encoded(noise(56, 84)))])


@covers("exception in engine step")
def test_engine_dies_and_is_restarted(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    may_restart = threading.Event()
    restart = AsyncLLM.restart

    def restart_later(self: AsyncLLM) -> None:
        if not may_restart.is_set():
            raise EngineError("not yet")
        restart(self)

    with monkeypatch.context() as patch:
        patch.setattr(AsyncLLM, "restart", restart_later)
        failing_forward(suite, patch, RuntimeError("secret at 0x7f00deadbeef"), after=4)
        body = {
            "messages": [{"role": "user", "content": "dies"}],
            "stream": True,
            "max_tokens": 50,
            "ignore_eos": True,
        }
        response = suite.client.post(CHAT, json=body)
        assert response.status_code == 200 and "secret" not in response.text
        events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        error = json.loads(events[-2])["error"]
        assert error["type"] == "server_error"
        check_safe(error["message"])
        assert suite.client.get("/health").status_code == 503
        assert suite.client.get("/ready").status_code == 503
        sent = suite.ask("hi")
        check_refusal(sent, 503, "engine", sent.error["param"])
    may_restart.set()
    wait_until(lambda: suite.client.get("/health").status_code == 200)


@covers("kill -9 of worker process")
def test_killed_media_workers(suite: Suite, media_workers: MediaWorkerPool) -> None:
    expected = suite.accepted([image_item(encoded(noise(84, 84)))], cache_salt="k").answer
    for number in range(3):
        os.kill(media_workers.worker_pids[0], signal.SIGKILL)
        sent = suite.accepted([image_item(encoded(noise(84, 84)))], cache_salt=f"k{number}")
        assert sent.answer == expected
    wait_until(lambda: len(media_workers.worker_pids) == media_workers.num_workers)


@contextmanager
def serve(*options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen2vl", "serve", "--model", "nano", "--device", "cpu", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@covers("port in use / bind 0.0.0.0 without key")
def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        with serve("--port", str(port)) as process:
            _, text = process.communicate(timeout=60)
    assert process.returncode in (1, 2)
    assert str(port) in text and "Traceback" not in text
    assert len(text.strip().splitlines()) == 1


@covers(
    "port in use / bind 0.0.0.0 without key",
    "SIGTERM with in-flight requests",
    "SIGTERM with timeout 0 / second SIGINT",
)
def test_termination() -> None:
    """A running stream holds up the end after SIGTERM; a second signal ends it at once."""
    port = free_port()
    with serve("--host", "0.0.0.0", "--port", str(port)) as process:
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True)
        reader.start()
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_ready(url) or process.poll() is not None, 60)
        assert process.poll() is None, lines
        body = {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "max_tokens": 4000,
            "ignore_eos": True,
        }
        with httpx2.stream("POST", url + CHAT, json=body, timeout=30) as response:
            chunks = response.iter_lines()
            next(chunks)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not is_ready(url))
            assert "error" not in next(line for line in chunks if line)  # the stream goes on
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            rest = [line for line in chunks if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["error"]["type"] == "server_error"
        process.wait(10)
        assert time.monotonic() - start < 4
        reader.join(10)
    assert any("key" in line.lower() and "0.0.0.0" in line for line in lines), lines


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False
