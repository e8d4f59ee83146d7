"""What the server adds: the client's wall time minus the engine's own span.

    python benchmarks/serve_overhead.py [--requests 500] [--only text picture again]

The engine's span is the sum of usage.timings_ms: preprocessing, waiting, vision encoder, prefill,
decoding. "text" and "picture" (224 x 224 JPEG) are requests of 16 tokens at concurrency 1 and 16,
each with its own question and picture. "again" asks a second question on a JPEG of one megapixel
that is sent again as base64, streamed: the time before its first token, beside the engine's
(preprocessing to prefill). Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

from record import ROOT, format_result
from serve.http_client import Connection
from serve.load import LoadProcess, LoadResult, LoadSpec
from serve.processes import ServerProcess, free_port, qwen2vl_command
from serve.prompts import SYSTEM, chat_body, jpeg_below, question

MAX_TOKENS = 16
MEGAPIXEL = (1000, 1000)
MAX_JPEG_BYTES = 400_000
PHASES_BEFORE_FIRST = ("preprocess", "queue", "encoder", "prefill")


def spread(values: list[float]) -> dict[str, float]:
    """Return median and 99th percentile."""
    percentiles = quantiles(values, n=100, method="inclusive")
    return {"p50_ms": round(percentiles[49], 2), "p99_ms": round(percentiles[98], 2)}


def overhead(result: LoadResult) -> dict[str, Any]:
    """Return wall time minus the engine's span, and the two.

    Raises:
        SystemExit: a request failed, or the usage of a response has no timings.
    """
    if result.failures or len(result.timings_ms) != len(result.latency_ms):
        raise SystemExit(f"failures: {result.failures}; timings: {len(result.timings_ms)}")
    spans = [sum(timings.values()) for timings in result.timings_ms]
    differences = [wall - span for wall, span in zip(result.latency_ms, spans, strict=True)]
    phases = {
        name: round(median(timings[name] for timings in result.timings_ms), 2)
        for name in result.timings_ms[0]
    }
    return spread(differences) | {"engine": spread(spans), "phases_ms": phases}


async def first_token(connection: Connection, body: bytes) -> tuple[float, dict[str, Any]]:
    """Return milliseconds to the first token of a stream, and the usage."""
    start = time.perf_counter()
    await connection.send("POST", "/v1/chat/completions", body)
    status, headers = await connection.receive_head()
    if status != 200:
        pieces = [piece async for piece in connection.pieces(headers)]
        raise SystemExit(f"{status}: {b''.join(pieces)!r}")
    first, usage = 0.0, {}
    async for event in connection.events(headers):
        if event == b"[DONE]":
            continue
        value = json.loads(event)
        delta = value["choices"][0]["delta"] if value["choices"] else {}
        if not first and delta.get("content"):
            first = 1000 * (time.perf_counter() - start)
        usage = value.get("usage") or usage
    return first, usage


async def second_questions(port: int, count: int) -> dict[str, Any]:
    """Ask two questions on each of `count` pictures; measure the second ones."""
    connection = Connection(port)
    first_ms, engine_ms, preprocess_ms, cached = [], [], [], []
    sizes = []
    for seed in range(count + 1):
        picture = jpeg_below(seed, *MEGAPIXEL, MAX_JPEG_BYTES)
        # The picture comes before the question: the second prompt differs after it only.
        for number in (2 * seed, 2 * seed + 1):
            body = chat_body(
                question(number),
                picture,
                max_tokens=MAX_TOKENS,
                system=SYSTEM,
                stream=True,
                stream_options={"include_usage": True},
            )
            wall, usage = await first_token(connection, body)
            if seed and number % 2:  # the first picture is the warm-up
                timings = usage["timings_ms"]
                first_ms.append(wall)
                engine_ms.append(sum(timings[name] for name in PHASES_BEFORE_FIRST))
                preprocess_ms.append(timings["preprocess"])
                cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        sizes.append(len(picture) / 1000)
    beside = [wall - engine for wall, engine in zip(first_ms, engine_ms, strict=True)]
    return {
        "beside": spread(beside),
        "first_token": spread(first_ms),
        "engine": spread(engine_ms),
        "preprocess_ms": round(median(preprocess_ms), 2),
        "cached_tokens": median(cached),
        "jpeg_kb": round(median(sizes)),
    }


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=40, help='of "again"')
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--server-options", default="", help="of qwen2vl serve")
    kinds = ("text", "picture", "again")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    given = parser.parse_args()
    numbers: dict[str, Any] = {"requests": given.requests}
    port = free_port()
    with TemporaryDirectory() as folder, LoadProcess() as load:
        command = qwen2vl_command(port, *given.server_options.split())
        with ServerProcess(command, port, log=Path(folder, "log"), cwd=ROOT):
            seed = 1
            for kind in (name for name in given.only if name != "again"):
                load.run(LoadSpec(port, kind, 20, 1, MAX_TOKENS, seed=seed))  # warm-up
                seed += 20
                for concurrency in given.concurrency:
                    spec = LoadSpec(port, kind, given.requests, concurrency, MAX_TOKENS, seed)
                    seed += given.requests
                    numbers[f"{kind} at {concurrency}"] = found = overhead(load.run(spec))
                    print(kind, concurrency, found, file=sys.stderr, flush=True)
            if "again" in given.only:
                numbers["again"] = asyncio.run(second_questions(port, given.pictures))
    print(format_result(numbers))


if __name__ == "__main__":
    main()
