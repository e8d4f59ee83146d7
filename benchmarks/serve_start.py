"""Time from exec to the first 200 of /ready, beside `python -c 'import torch'`.

    python benchmarks/serve_start.py [--rounds 5]

Both in turns, after one start of each that fills the file cache. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from record import ROOT, format_result
from serve.processes import ServerProcess, free_port, qwen2vl_command


def start_server(log: Path) -> float:
    """Return the seconds from exec to /ready 200."""
    port = free_port()
    server = ServerProcess(qwen2vl_command(port), port, log=log, cwd=ROOT)
    try:
        return server.start()
    finally:
        server.terminate()


def import_torch() -> float:
    """Return the seconds of an interpreter that imports torch."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ready, torch_import = [], []
    with TemporaryDirectory() as folder:
        for number in range(given.rounds + 1):
            times = start_server(Path(folder, "log")), import_torch()
            if number:
                ready.append(times[0])
                torch_import.append(times[1])
    numbers = {
        "ready_s": round(median(ready), 2),
        "ready_range_s": [round(min(ready), 2), round(max(ready), 2)],
        "import_torch_s": round(median(torch_import), 2),
        "starts": given.rounds,
    }
    print(format_result(numbers))


if __name__ == "__main__":
    main()
