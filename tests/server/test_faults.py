"""`qwen2vl serve` when processes are killed, clients vanish, or a request is made to exhaust it.

The faults are those of the benchmarks (benchmarks/serve/), a few of each; the long runs are marked
slow. The full ones are benchmarks/serve_faults.py and serve_bombs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

# The bars of benchmarks/serve_bombs.py are 50 ms and 32 MB; a test shares its machine with others.
MAX_CPU_MS = 150.0
MAX_PEAK_MIB = 64.0

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads processes from Linux' /proc"
)


@pytest.fixture(scope="module")
def serve() -> Iterator[Any]:
    """Give a function that imports a module of benchmarks/serve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield lambda name: import_module(f"serve.{name}")


@pytest.fixture(scope="module")
def new_server(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give a function that returns a server that is not started."""
    processes = serve("processes")
    log = tmp_path_factory.mktemp("server") / "log"

    def new(*options: str) -> Any:
        port = processes.free_port()
        command = processes.qwen2vl_command(port, *options)
        return processes.ServerProcess(command, port, log=log, cwd=ROOT)

    return new


@pytest.fixture(scope="module")
def server(new_server: Any) -> Iterator[Any]:
    """Run one server for the tests that leave it alive."""
    with new_server() as running:
        yield running


def check(report: Any, rounds: int) -> None:
    assert not report.wrong, report.wrong[:5]
    assert report.rounds == rounds


def test_a_killed_media_worker_costs_no_request(serve: Any, server: Any) -> None:
    report = serve("faults").kill_media_workers(server, 3)
    check(report, 3)
    assert report.answered == 3 * 32
    assert report.hits  # a worker was killed while it decoded


def test_a_killed_client_frees_the_engine(serve: Any, server: Any) -> None:
    check(serve("faults").kill_clients(server, 1), 1)


def test_sigterm_loses_no_accepted_request(serve: Any, new_server: Any) -> None:
    report = serve("faults").terminate_under_load(new_server, 1)
    check(report, 1)
    assert report.answered == 10


@pytest.mark.parametrize("name", ["png", "declared_body", "endless_body"])
def test_a_bomb_is_refused_cheaply(name: str, serve: Any, server: Any) -> None:
    refuse = serve("bombs").refuse
    refuse(server, name)  # what the first one allocates is not counted
    cost = refuse(server, name, times=5)
    assert cost.status in (400, 413)
    assert cost.cpu_ms < MAX_CPU_MS
    assert cost.peak_mib < MAX_PEAK_MIB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slow_body", "slow_head"])
def test_one_byte_a_second_is_refused(name: str, serve: Any, server: Any) -> None:
    cost = serve("bombs").refuse(server, name)
    assert cost.status in (0, 408)
    assert cost.cpu_ms < MAX_CPU_MS
    assert cost.peak_mib < MAX_PEAK_MIB


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["kill_media_workers", "kill_clients"])
def test_many_faults(kind: str, serve: Any, server: Any) -> None:
    check(getattr(serve("faults"), kind)(server, 50), 50)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_terminations(serve: Any, new_server: Any) -> None:
    check(serve("faults").terminate_under_load(new_server, 50), 50)
