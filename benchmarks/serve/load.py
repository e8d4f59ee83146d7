"""Load generator: a process of its own that sends requests at a fixed concurrency.

    python -m serve.load        (with benchmarks/ on PYTHONPATH)

One JSON line on stdin describes one measurement (`LoadSpec`), one on stdout is its `LoadResult`.
Bodies are made before the clock starts. `client_cpu` of the result says how busy this process was:
close to the seconds of the run, it would be the bottleneck.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any, Self

from serve.http_client import Connection, ServerClosedError
from serve.prompts import chat_bodies

__all__ = ["LoadProcess", "LoadResult", "LoadSpec", "run_load"]

FOLDER = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class LoadSpec:
    """One measurement: `num_requests` of a kind at a concurrency."""

    port: int
    kind: str  # of prompts.chat_bodies
    num_requests: int
    concurrency: int
    max_tokens: int
    seed: int
    stream: bool = False
    path: str = "/v1/chat/completions"
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of each body


@dataclass
class LoadResult:
    """Times of the requests of one measurement, in milliseconds, in the order of their ends."""

    seconds: float = 0.0
    client_cpu: float = 0.0
    latency_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)  # to the first event, of streams
    failures: dict[str, int] = field(default_factory=dict)
    prompt_tokens: list[int] = field(default_factory=list)
    completion_tokens: list[int] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    timings_ms: list[dict[str, float]] = field(default_factory=list)  # usage.timings_ms

    @property
    def requests_per_second(self) -> float:
        return len(self.latency_ms) / self.seconds

    def percentile(self, percent: int) -> float:
        """Return a percentile of the latency in milliseconds."""
        return quantiles(self.latency_ms, n=100, method="inclusive")[percent - 1]

    def add_usage(self, usage: dict[str, Any]) -> None:
        """Record the usage object of one response."""
        self.prompt_tokens.append(usage.get("prompt_tokens", 0))
        self.completion_tokens.append(usage.get("completion_tokens", 0))
        details = usage.get("prompt_tokens_details") or {}
        self.cached_tokens.append(details.get("cached_tokens") or 0)
        if "timings_ms" in usage:
            self.timings_ms.append(usage["timings_ms"])


class _Run:
    """One measurement in progress: workers take bodies from one list."""

    def __init__(self, spec: LoadSpec) -> None:
        extra = dict(spec.extra)
        if spec.stream:
            extra |= {"stream": True, "stream_options": {"include_usage": True}}
        self.spec = spec
        self.bodies = iter(
            chat_bodies(spec.kind, spec.seed, spec.num_requests, spec.max_tokens, **extra)
        )
        self.result = LoadResult()
        self.failures: Counter[str] = Counter()

    async def run(self) -> LoadResult:
        cpu, start = time.process_time(), time.perf_counter()
        await asyncio.gather(*(self._work() for _ in range(self.spec.concurrency)))
        self.result.seconds = time.perf_counter() - start
        self.result.client_cpu = time.process_time() - cpu
        self.result.failures = dict(self.failures)
        return self.result

    async def _work(self) -> None:
        connection = Connection(self.spec.port)
        for body in self.bodies:
            start = time.perf_counter()
            try:
                failure = await (self._stream if self.spec.stream else self._whole)(
                    connection, body, start
                )
            except (OSError, ServerClosedError) as error:
                connection.abort()
                failure = f"{type(error).__name__}: {error}"
            if failure:
                self.failures[failure[:300]] += 1
            else:
                self.result.latency_ms.append(1000 * (time.perf_counter() - start))
        await connection.close()

    async def _whole(self, connection: Connection, body: bytes, start: float) -> str:
        del start
        reply = await connection.request("POST", self.spec.path, body)
        if reply.status != 200:
            return f"{reply.status}: {reply.body.decode(errors='replace')}"
        self.result.add_usage(reply.json().get("usage") or {})
        return ""

    async def _stream(self, connection: Connection, body: bytes, start: float) -> str:
        await connection.send("POST", self.spec.path, body)
        status, headers = await connection.receive_head()
        last, first = b"", 0.0
        if status != 200:
            pieces = [piece async for piece in connection.pieces(headers)]
            return f"{status}: {b''.join(pieces).decode(errors='replace')}"
        async for event in connection.events(headers):
            # The first event has the role only; the first token comes with the first content.
            if not first and b'"content":' in event and b'"content":""' not in event:
                first = 1000 * (time.perf_counter() - start)
            if event != b"[DONE]":
                last = event
        self.result.first_ms.append(first)
        self.result.add_usage(json.loads(last).get("usage") or {})
        return ""


def run_load(spec: LoadSpec) -> LoadResult:
    """Run one measurement in this process."""
    return asyncio.run(_Run(spec).run())


class LoadProcess:
    """The load generator as a child process; a context manager."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve.load"],
            env=os.environ | {"PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, spec: LoadSpec) -> None:
        """Start one measurement."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(spec)) + "\n")
        self.process.stdin.flush()

    def result(self) -> LoadResult:
        """Wait for the measurement that was started.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load generator ended with {self.process.wait()}")
        return LoadResult(**json.loads(line))

    def run(self, spec: LoadSpec) -> LoadResult:
        """Run one measurement."""
        self.start(spec)
        return self.result()

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """Run the measurements that stdin asks for."""
    for line in sys.stdin:
        print(json.dumps(asdict(run_load(LoadSpec(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    main()
