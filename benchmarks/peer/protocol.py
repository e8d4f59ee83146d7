"""Worker protocol of peers.py (JSON lines on stdin and stdout), prompts with images, and timing.

Runs in the environment of each peer, so it depends on Python and numpy only. A worker is started as
`python run_NAME.py OPTIONS`, loads its model, writes {"ready": ...}, and then answers each line
{"case": ...} with {"figures": ...} or {"error": ...}, until its input ends.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Case:
    """One prompt: an image or none, then text; `text` and `ids` are the same tokens."""

    text: str
    ids: list[int]
    size: list[int] | None  # height and width of the image
    seed: int  # of its pixels
    new_tokens: int

    def pixels(self) -> Any:
        """Return the random image, (H, W, 3) uint8."""
        assert self.size is not None
        shape = (*self.size, 3)
        return np.random.default_rng(self.seed).integers(0, 256, shape, dtype=np.uint8)


class TokenTimer:
    """Records the start of a request and the time of each token."""

    def __init__(self) -> None:
        self.token_times: list[float] = []
        self.start = time.perf_counter()

    def token(self) -> None:
        """Record the time of one token."""
        self.token_times.append(time.perf_counter())

    def figures(self, prompt_tokens: int, *, free: float = 0.0) -> dict[str, float]:
        """Return TTFT and median step; `free` seconds before the first token are not counted."""
        gaps = [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]
        return {
            "first_ms": 1000 * (self.token_times[0] - self.start - free),
            "step_ms": 1000 * median(gaps),
            "prompt_tokens": prompt_tokens,
            "new_tokens": len(self.token_times),
        }


Answer = Callable[[Case], dict[str, float]]


def serve(load: Callable[[dict[str, Any]], tuple[Answer, dict[str, str]]]) -> None:
    """Load the model with `load`, which also returns versions, and serve until the input ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries goes to the log

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    start = time.perf_counter()
    try:
        answer, versions = load(json.loads(sys.argv[1]))
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
        raise
    send({"ready": {"versions": versions, "load_s": round(time.perf_counter() - start, 1)}})
    for line in sys.stdin:
        figures = answer(Case(**json.loads(line)["case"]))
        # Linux counts in KiB.
        figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        send({"figures": figures})
