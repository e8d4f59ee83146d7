"""What a refusal costs the server: a decompression bomb, endless bodies, one byte a second.

    python benchmarks/serve_bombs.py [--times 20]

CPU time and peak memory of the server and its decoding workers, above those before. A server is
idle otherwise; "idle" is its CPU time for comparison. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from record import ROOT, format_result
from serve.bombs import BOMBS, refuse
from serve.processes import ServerProcess, free_port, qwen2vl_command

SLOW = ("slow_body", "slow_head")  # each takes as long as the server's time limit


def main() -> None:
    """Send each kind and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=list(BOMBS), default=list(BOMBS))
    given = parser.parse_args()
    numbers: dict[str, Any] = {}
    port = free_port()
    with (
        TemporaryDirectory() as folder,
        ServerProcess(qwen2vl_command(port), port, log=Path(folder, "log"), cwd=ROOT) as server,
    ):
        before = server.usage().cpu_seconds
        time.sleep(2)
        numbers["idle_cpu_ms_per_s"] = round(500 * (server.usage().cpu_seconds - before), 1)
        for name in given.only:
            refuse(server, name) if name not in SLOW else None  # warm-up
            cost = refuse(server, name, times=1 if name in SLOW else given.times)
            numbers[name] = {key: round(value, 2) for key, value in asdict(cost).items()}
    print(format_result(numbers))


if __name__ == "__main__":
    main()
