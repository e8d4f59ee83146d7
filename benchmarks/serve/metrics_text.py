"""Values of the server's /metrics page."""

from __future__ import annotations

import re

from serve.processes import ServerProcess

__all__ = ["metric", "num_requests"]


def metric(server: ServerProcess, name: str) -> float:
    """Return the sum of a metric over its labels.

    Raises:
        LookupError: the page does not have it.
    """
    status, page = server.get("/metrics")
    pattern = rf"^qwen2vl:{re.escape(name)}(?:{{[^}}]*}})? (\S+)$"
    found = re.findall(pattern, page.decode(), re.MULTILINE)
    if not found:
        raise LookupError(f"/metrics has no qwen2vl:{name} (status {status})")
    return sum(map(float, found))


def num_requests(server: ServerProcess) -> float:
    """Return the number of requests that run or wait in the engine."""
    return metric(server, "num_requests_running") + metric(server, "num_requests_waiting")
