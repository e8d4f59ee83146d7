"""`qwen2vl serve` under load: many mixed clients, bad requests, clients that leave.

The clients and requests are those of the benchmarks (benchmarks/serve/), in short runs; the long
ones are marked slow. The full ones are benchmarks/serve_parity.py and serve_endurance.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.engine import LLM

ROOT = Path(__file__).resolve().parent.parent.parent
CLIENTS = 32
LONG = 1000  # requests after which memory may not grow

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the memory of processes from Linux' /proc"
)


@pytest.fixture(scope="module")
def serve() -> Iterator[Any]:
    """Give a function that imports a module of benchmarks/serve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield lambda name: import_module(f"serve.{name}")


@pytest.fixture(scope="module")
def server(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run one server in float32 for all tests of this file."""
    processes = serve("processes")
    port = processes.free_port()
    command = processes.qwen2vl_command(port, "--dtype", "float32", "--device", "cpu")
    log = tmp_path_factory.mktemp("server") / "log"
    with processes.ServerProcess(command, port, log=log, cwd=ROOT) as running:
        yield running


def check_parity(serve: Any, server: Any, count: int, seed: int) -> None:
    parity = serve("parity")
    requests = parity.mixed_bodies(count, seed)
    found = asyncio.run(parity.server_answers(server.port, requests, CLIENTS))
    llm = LLM("nano", dtype="float32", device="cpu")
    expected = [parity.llm_answer(llm, request) for request in requests]
    pairs = zip(found, expected, strict=True)
    wrong = [text for mine, other in pairs if (text := parity.differences(mine, other))]
    assert not wrong, wrong[:3]


def check_mixed(serve: Any, server: Any, count: int, concurrency: int, warm_up: int) -> float:
    """Send mixed requests; return the growth of memory after the first `warm_up` ones."""
    mixed, num_requests = serve("mixed"), serve("metrics_text").num_requests
    wait_until = serve("processes").wait_until
    load, usages = mixed.MixedLoad(server.port), []
    if warm_up >= LONG:
        assert not asyncio.run(load.fill_kv_cache()).failures
    for number in (warm_up, count - warm_up):
        result = asyncio.run(load.run(number, concurrency))
        wait_until(lambda: num_requests(server) == 0, 20, "no request runs")
        usages.append(server.usage())
        assert not result.failures
        assert not result.wrong_refusals
        assert not result.different
    assert set(result.counts) == {"good", "bad", "left"}
    before, after = usages
    assert after.num_processes == before.num_processes
    # Sockets of clients that left are closed a moment after their requests have ended.
    wait_until(lambda: server.usage().open_files <= before.open_files, 20, "files are closed")
    return after.rss_mib / before.rss_mib - 1


def test_concurrent_clients_get_the_answers_of_llm(serve: Any, server: Any) -> None:
    check_parity(serve, server, 64, seed=0)


def test_bad_requests_and_leaving_clients_harm_no_other(serve: Any, server: Any) -> None:
    check_mixed(serve, server, 240, concurrency=16, warm_up=120)


def test_every_bad_request_is_refused(serve: Any, server: Any) -> None:
    """Each is sent once, on a connection of its own, and the error says what is wrong."""
    bad_requests, http_client = serve("bad_requests"), serve("http_client")

    async def send(bad: Any) -> Any:
        connection = http_client.Connection(server.port)
        try:
            return await connection.request(bad.method, bad.path, bad.body, bad.headers)
        finally:
            connection.abort()

    for bad in bad_requests.bad_requests():
        reply = asyncio.run(send(bad))
        text = reply.body.decode()
        assert 400 <= reply.status < 500, (bad.name, reply.status, text)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}, bad.name
        assert not bad_requests.leaks_internals(text), (bad.name, text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_concurrent_clients_get_the_answers_of_llm_long(serve: Any, server: Any) -> None:
    check_parity(serve, server, 320, seed=1000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow(serve: Any, server: Any) -> None:
    growth = check_mixed(serve, server, 10_000, concurrency=16, warm_up=LONG)
    assert growth < 0.05
