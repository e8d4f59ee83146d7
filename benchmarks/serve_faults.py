"""Faults under load: kill -9 of decoding workers and of clients, SIGTERM of the server.

    python benchmarks/serve_faults.py [--rounds 50] [--only workers clients terminate]

After each the server has to answer a fixed request with the same text; no request may be lost that
was accepted before SIGTERM. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from record import ROOT, format_result
from serve.faults import FaultReport, kill_clients, kill_media_workers, terminate_under_load
from serve.processes import ServerProcess, free_port, qwen2vl_command

FAULTS = ("workers", "clients", "terminate")


def figures(report: FaultReport) -> dict[str, Any]:
    """Return the figures of one kind of fault, and print what was wrong."""
    for text in report.wrong[:20]:
        print(text, file=sys.stderr)
    return {
        "rounds": report.rounds,
        "answered": report.answered,
        "hits": report.hits,
        "wrong": len(report.wrong),
        "seconds": {
            "median": round(median(report.seconds or [0.0]), 2),
            "max": round(max(report.seconds, default=0.0), 2),
        },
    }


def main() -> None:
    """Make the faults and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=FAULTS)
    given = parser.parse_args()
    numbers: dict[str, Any] = {}
    with TemporaryDirectory() as folder:

        def new_server() -> ServerProcess:
            port = free_port()
            return ServerProcess(qwen2vl_command(port), port, log=Path(folder, "log"), cwd=ROOT)

        if {"workers", "clients"} & set(given.only):
            with new_server() as server:
                if "workers" in given.only:
                    numbers["workers"] = figures(kill_media_workers(server, given.rounds))
                if "clients" in given.only:
                    numbers["clients"] = figures(kill_clients(server, given.rounds))
        if "terminate" in given.only:
            numbers["terminate"] = figures(terminate_under_load(new_server, given.rounds))
    print(format_result(numbers))


if __name__ == "__main__":
    main()
