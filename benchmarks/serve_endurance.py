"""Many mixed requests, a third of them bad, clients leaving midway: failures, memory, open files.

    python benchmarks/serve_endurance.py [--requests 10000] [--concurrency 16]

Good requests come from a pool of 100, so that each answer is compared with its first one and the
caches of the server are full after the first thousand; 50 long prompts before fill the KV cache,
whose pages take memory when they are first written. Memory is the resident memory of the server
and its decoding workers, measured after every thousand requests. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from record import ROOT, format_result
from serve.metrics_text import num_requests
from serve.mixed import POOL, MixedLoad, MixedResult
from serve.processes import ProcessUsage, ServerProcess, free_port, qwen2vl_command, wait_until

BLOCK = 1000


def endure(
    server: ServerProcess, requests: int, concurrency: int, block: int, pool: int
) -> tuple[MixedResult, list[ProcessUsage]]:
    """Send the requests block by block; return counts, failures and the usage after each block.

    Raises:
        TimeoutError: requests still ran 10 seconds after a block.
    """
    load, usages = MixedLoad(server.port, pool=pool), []
    total = asyncio.run(load.fill_kv_cache())
    for number in range(0, requests, block):
        result = asyncio.run(load.run(min(block, requests - number), concurrency))
        wait_until(lambda: num_requests(server) == 0, 10, "no request runs")
        for mine, new in zip(vars(total).values(), vars(result).values(), strict=True):
            mine += new
        usages.append(server.usage())
        print(json.dumps([number, vars(usages[-1])]), dict(result.counts), file=sys.stderr)
    return total, usages


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--block", type=int, default=BLOCK, help="requests between measurements")
    parser.add_argument("--pool", type=int, default=POOL, help="different good requests")
    given = parser.parse_args()
    port = free_port()
    with TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with ServerProcess(qwen2vl_command(port), port, log=log, cwd=ROOT) as server:
            total, usages = endure(
                server, given.requests, given.concurrency, given.block, given.pool
            )
    first, last = usages[0], usages[-1]
    numbers = {
        "requests": dict(total.counts),
        "failures_of_good": sum(total.failures.values()),
        "different_answers": len(total.different),
        "wrong_refusals": sum(total.wrong_refusals.values()),
        "memory_first_mib": round(first.rss_mib, 1),
        "memory_last_mib": round(last.rss_mib, 1),
        "memory_growth_percent": round(100 * (last.rss_mib / first.rss_mib - 1), 2),
        "memory_mib": [round(usage.rss_mib) for usage in usages],
        "open_files": [first.open_files, last.open_files],
        "processes": [first.num_processes, last.num_processes],
    }
    for kind, examples in (("failures", total.failures), ("refusals", total.wrong_refusals)):
        for text, count in examples.most_common(20):
            print(f"{kind}: {count} x {text}", file=sys.stderr)
    print(format_result(numbers))


if __name__ == "__main__":
    main()
