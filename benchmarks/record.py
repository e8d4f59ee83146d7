"""One line for results.md: date, commit, machine, command, and the measured numbers."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROOT", "format_result"]

ROOT = Path(__file__).resolve().parent.parent


def format_result(numbers: dict[str, Any]) -> str:
    """Format the numbers of a run as JSON, with what is needed to reproduce them."""
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return json.dumps(
        {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": _commit(),
            "machine": _machine(),
            "command": " ".join(["python", str(script), *sys.argv[1:]]),
            "numbers": numbers,
        }
    )


def _machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    where = f"{platform.machine()} {capability}, {threads} threads"
    if torch.cuda.is_available():
        where += f", {torch.cuda.get_device_name()}"
    return f"{where}, torch {torch.__version__}"


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip()
