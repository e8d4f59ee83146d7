"""Requests a second of our server, of a plain one, and of llama.cpp's, interleaved in one run.

    python benchmarks/serve_throughput.py [--rounds 8] [--requests 96] [--peers plain llama-f32]

All servers run at the same time on nano; in each round each one answers the same requests at the
given concurrency, in alternating order. Every request has its own picture (224 x 224 JPEG) and
question; greedy, max_tokens tokens each, ignore_eos. In "picture" two prompts share nothing but the
first tokens of the chat template, in "shared" a system message of about 400 tokens. The load comes
from a process of its own, whose share of a CPU and whose limit without a model are reported. Ratios
are ours / peer within a round; the quartiles show their variation. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from peers_install import InstallError
from record import ROOT, format_result
from serve.llama_server import LlamaServer
from serve.load import LoadProcess, LoadResult, LoadSpec
from serve.processes import ServerProcess, free_port, qwen2vl_command

MODEL = ROOT / "qwen2vl" / "nano"
CACHE = Path.home() / ".cache" / "qwen2vl" / "peers"
KINDS = ("picture", "shared")
PEERS = ("plain", "llama-f32", "llama-f16")
BENCHMARKS = Path(__file__).resolve().parent


def server(name: str, given: argparse.Namespace) -> ServerProcess:
    """Return a server that is not started.

    Raises:
        InstallError: llama-server could not be built, or nano not converted.
    """
    port, ready = free_port(), "/ready"
    environment = {"PYTHONPATH": str(BENCHMARKS), "HF_HUB_OFFLINE": "1"}
    if name == "trivial":
        ready, command = "/", [sys.executable, "-m", "serve.trivial_server", str(port)]
    elif name == "ours":
        options = ["--dtype", given.dtype, *given.server_options.split()]
        environment, command = {}, qwen2vl_command(port, *options)
    elif name == "plain":
        module = [sys.executable, "-m", "serve.plain_server"]
        command = [*module, "--model", str(MODEL), "--port", str(port), "--dtype", given.dtype]
    else:
        llama = LlamaServer(given.cache, MODEL)
        ready, command = (
            "/health",
            llama.command(
                port,
                kind=name.removeprefix("llama-"),
                concurrency=given.concurrency,
                threads=given.llama_threads,
            ),
        )
    log = given.logs / f"serve-{name}.log"
    return ServerProcess(
        command, port, ready_path=ready, log=log, environment=environment, cwd=ROOT
    )


def measure(load: LoadProcess, port: int, kind: str, given: argparse.Namespace, seed: int) -> Any:
    """Run one measurement and check that all requests succeeded with equal work.

    Raises:
        SystemExit: a request failed, or an answer had another number of tokens.
    """
    result = load.run(
        LoadSpec(port, kind, given.requests, given.concurrency, given.max_tokens, seed)
    )
    if result.failures:
        raise SystemExit(f"requests failed: {result.failures}")
    return result


def rounds(
    servers: dict[str, ServerProcess], load: LoadProcess, given: argparse.Namespace
) -> Iterator[tuple[str, dict[str, LoadResult]]]:
    """Yield the kind of requests and the results of all servers, round by round."""
    seed = 1
    for number in range(given.rounds + 1):
        for kind in given.kinds:
            order = list(servers)[:: 1 if number % 2 else -1]
            found = {name: measure(load, servers[name].port, kind, given, seed) for name in order}
            seed += given.requests
            if number:  # the first round is the warm-up
                shown = {name: round(one.requests_per_second, 2) for name, one in found.items()}
                print(kind, shown, file=sys.stderr, flush=True)
                yield kind, found


def summary(results: list[dict[str, LoadResult]], max_tokens: int) -> dict[str, Any]:
    """Return the figures of one kind of requests."""
    figures: dict[str, Any] = {}
    for name in results[0]:
        runs = [found[name] for found in results]
        speeds = [one.requests_per_second for one in runs]
        figures[name] = {
            "per_second": round(median(speeds), 2),
            "p50_ms": round(median(one.percentile(50) for one in runs), 1),
            "p99_ms": round(median(one.percentile(99) for one in runs), 1),
            "prompt_tokens": median(runs[0].prompt_tokens),
            "cached_tokens": median(runs[0].cached_tokens),
            "client_cpu_percent": round(
                100 * sum(one.client_cpu for one in runs) / sum(one.seconds for one in runs), 1
            ),
        }
        odd = [n for one in runs for n in one.completion_tokens if n != max_tokens]
        if odd:
            figures[name]["answers_of_other_length"] = len(odd)
        if name != "ours":
            ratios = [
                found["ours"].requests_per_second / found[name].requests_per_second
                for found in results
            ]
            figures[name]["ours_over"] = round(median(ratios), 2)
            figures[name]["quartiles"] = [round(value, 2) for value in quantiles(ratios, n=4)[::2]]
    return figures


def client_limit(load: LoadProcess, given: argparse.Namespace) -> float:
    """Return the requests a second of the load generator on a server that does nothing."""
    with server("trivial", given) as trivial:
        spec = LoadSpec(trivial.port, "picture", 1000, given.concurrency, given.max_tokens, 0)
        return load.run(spec).requests_per_second


def main() -> None:
    """Start the servers, measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, default=96, help="in a round, of each server")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS[:2])
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of ours and plain"
    )
    parser.add_argument("--server-options", default="", help="of qwen2vl serve")
    parser.add_argument("--llama-threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--logs", type=Path, default=CACHE)
    given = parser.parse_args()
    given.logs.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {
        "dtype": given.dtype,
        "concurrency": given.concurrency,
        "max_tokens": given.max_tokens,
    }
    unmeasured: dict[str, str] = {}
    with ExitStack() as stack:
        load = stack.enter_context(LoadProcess())
        numbers["client_alone_per_second"] = round(client_limit(load, given))
        servers: dict[str, ServerProcess] = {}
        for name in ("ours", *given.peers):
            try:
                servers[name] = stack.enter_context(server(name, given))
            except (InstallError, RuntimeError) as error:
                if name == "ours":
                    raise
                unmeasured[name] = str(error).replace(str(Path.home()), "~")
        results: dict[str, list[dict[str, LoadResult]]] = {}
        for kind, found in rounds(servers, load, given):
            results.setdefault(kind, []).append(found)
    numbers |= {kind: summary(found, given.max_tokens) for kind, found in results.items()}
    print(format_result(numbers | {"unmeasured": unmeasured}))


if __name__ == "__main__":
    main()
