"""Faults under load: killed decoding workers, killed clients, SIGTERM; used by tests and benchmark.

Each function does one kind of fault several times and returns what went wrong, as texts; none is
the aim. The canary is one fixed request, which has to be answered with the same text each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from serve.http_client import Connection, ServerClosedError
from serve.load import LoadProcess, LoadSpec
from serve.metrics_text import num_requests
from serve.processes import ServerProcess, media_worker_pids, wait_until
from serve.prompts import chat_body, jpeg, question

__all__ = ["FaultReport", "kill_clients", "kill_media_workers", "terminate_under_load"]

CHAT = "/v1/chat/completions"
EXIT_CODES = (0, -signal.SIGTERM)  # uvicorn ends by the signal it got, after its shutdown


@dataclass
class FaultReport:
    """How often a fault was made, and what went wrong."""

    rounds: int = 0
    answered: int = 0  # requests under load that were answered completely
    hits: int = 0  # workers that were killed while they decoded
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # until the state after the fault


class Canary:
    """One fixed request and its first answer."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.body = chat_body("What is in the picture?", jpeg(7), max_tokens=8)
        self.answer = self.ask()

    def ask(self) -> str:
        """Return the text, or what was answered in its place."""
        reply = asyncio.run(_post(self.port, self.body))
        return reply if isinstance(reply, str) else "no answer"

    def check(self, report: FaultReport, when: str) -> None:
        """Ask again and compare."""
        answer = self.ask()
        if answer != self.answer:
            report.wrong.append(f"{when}: {answer[:200]!r} in place of {self.answer!r}")


async def _post(port: int, body: bytes) -> str:
    connection = Connection(port)
    try:
        reply = await connection.request("POST", CHAT, body)
    except (OSError, ServerClosedError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.abort()
    if reply.status != 200:
        return f"{reply.status}: {reply.body.decode(errors='replace')}"
    return reply.json()["choices"][0]["message"]["content"]


def kill_media_workers(server: ServerProcess, rounds: int, *, concurrency: int = 8) -> FaultReport:
    """Kill -9 one decoding worker after another while pictures are decoded.

    A request whose worker is killed is tried once more on another one, so none may fail.
    """
    report, canary = FaultReport(), Canary(server.port)
    num_workers = len(media_worker_pids(server.pid))
    if not num_workers:
        report.wrong.append("the server has no decoding worker")
        return report
    with LoadProcess() as load:
        for number in range(rounds):
            seed = 1000 * number
            load.start(LoadSpec(server.port, "large", 4 * concurrency, concurrency, 4, seed))
            with contextlib.suppress(ProcessLookupError):
                os.kill(_busy_worker(server, report), signal.SIGKILL)
            began = time.perf_counter()
            result = load.result()
            report.rounds += 1
            report.answered += len(result.latency_ms)
            report.wrong += [f"{count} x {text}" for text, count in result.failures.items()]
            try:
                wait_until(
                    lambda: len(media_worker_pids(server.pid)) == num_workers, 10, "new worker"
                )
            except TimeoutError as error:
                report.wrong.append(str(error))
            report.seconds.append(time.perf_counter() - began)
            canary.check(report, f"after kill {number} of a worker")
    return report


def _busy_worker(server: ServerProcess, report: FaultReport) -> int:
    """Return a worker that decodes now, or any if none is seen to within 10 seconds."""
    end, pids = time.monotonic() + 10, media_worker_pids(server.pid)
    while time.monotonic() < end:
        for pid in pids:
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if state == "R":
                    report.hits += 1
                    return pid
        time.sleep(0.001)
    return pids[0]


def kill_clients(server: ServerProcess, rounds: int, *, concurrency: int = 8) -> FaultReport:
    """Kill -9 a client process with running streams; the engine has to be free soon after."""
    report, canary = FaultReport(), Canary(server.port)
    for number in range(rounds):
        load = LoadProcess()
        spec = LoadSpec(
            server.port, "picture", concurrency, concurrency, 2000, 1000 * number, stream=True
        )
        try:
            load.start(spec)
            wait_until(lambda: num_requests(server) >= concurrency / 2, 30, "streams run")
        finally:
            load.close()
        began = time.perf_counter()
        report.rounds += 1
        try:
            wait_until(lambda: num_requests(server) == 0, 10, "requests of a killed client end")
        except TimeoutError as error:
            report.wrong.append(str(error))
        report.seconds.append(time.perf_counter() - began)
        canary.check(report, f"after kill {number} of a client")
    return report


def terminate_under_load(
    new_server: Callable[[], ServerProcess], rounds: int, *, streams: int = 6, others: int = 4
) -> FaultReport:
    """SIGTERM a server with running requests: each accepted one is answered, then it exits."""
    report = FaultReport()
    for number in range(rounds):
        server = new_server()
        try:
            server.start()
            asyncio.run(_terminate(server, report, streams, others, number))
        except (TimeoutError, RuntimeError) as error:
            report.wrong.append(f"round {number}: {error}")
        finally:
            server.kill()
        report.rounds += 1
    return report


async def _terminate(
    server: ServerProcess, report: FaultReport, streams: int, others: int, number: int
) -> None:
    running = [
        asyncio.create_task(_complete(server.port, 100 * number + index, index < streams))
        for index in range(streams + others)
    ]
    await asyncio.to_thread(
        wait_until, lambda: num_requests(server) >= len(running), 30, "all requests run"
    )
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    began = time.perf_counter()
    late = await _refused(server.port)
    for task in running:
        wrong = await task
        report.wrong += [f"round {number}: {wrong}"] if wrong else []
        report.answered += not wrong
    code = await asyncio.to_thread(server.process.wait, 30)
    report.seconds.append(time.perf_counter() - began)
    if code not in EXIT_CODES:
        report.wrong.append(f"round {number}: exit code {code}")
    if late:
        report.wrong.append(f"round {number}: a request after SIGTERM: {late}")


async def _complete(port: int, seed: int, stream: bool) -> str:
    """Send one long request; return what is wrong with its answer, or ""."""
    body = chat_body(question(seed), jpeg(seed), max_tokens=300, stream=stream)
    connection = Connection(port)
    try:
        await connection.send("POST", CHAT, body)
        status, headers = await connection.receive_head()
        data = b"".join([piece async for piece in connection.pieces(headers)])
    except (OSError, ServerClosedError) as error:
        return f"lost, {'stream' if stream else 'no stream'}: {type(error).__name__}: {error}"
    finally:
        connection.abort()
    end = b"data: [DONE]" if stream else b'"completion_tokens":300'
    complete = status == 200 and end in data and b'"length"' in data
    return "" if complete else f"{status}: {data[-200:]!r}"


async def _refused(port: int) -> str:
    """Send a request that comes too late; return what is wrong with the refusal, or "".

    The first ones may come before the signal is handled, and are accepted then.
    """
    answer = ""
    for _ in range(50):
        answer = await _post(port, chat_body("Hello", max_tokens=1))
        if answer.startswith(("503", "ConnectionRefused", "ServerClosed", "ConnectionReset")):
            return ""
        await asyncio.sleep(0.01)
    return answer
