"""What the workers of peers.py share: one JSON line in, one out; pictures; a watch.

Runs in every peer's own environment, so it needs nothing but Python and numpy. A worker is started
as `python run_NAME.py OPTIONS`, loads its model, says {"ready": ...}, and then answers each line
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

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Case:
    """One question: a picture or none, then words; both sides of `text` and `ids` are the same."""

    text: str
    ids: list[int]
    size: list[int] | None  # height and width of the picture
    seed: int  # of its pixels
    new_tokens: int

    def pixels(self) -> Any:
        """Draw the picture, (H, W, 3) uint8."""
        assert self.size is not None
        shape = (*self.size, 3)
        return np.random.default_rng(self.seed).integers(0, 256, shape, dtype=np.uint8)


class Watch:
    """When the question was put, and when each token came."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.began = time.perf_counter()

    def token(self) -> None:
        """Note that another token is there."""
        self.moments.append(time.perf_counter())

    def figures(self, prompt_tokens: int, *, free: float = 0.0) -> dict[str, float]:
        """Sum up; `free` are seconds before the first token that do not count."""
        gaps = [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]
        return {
            "first_ms": 1000 * (self.moments[0] - self.began - free),
            "step_ms": 1000 * median(gaps),
            "prompt_tokens": prompt_tokens,
            "new_tokens": len(self.moments),
        }


Answer = Callable[[Case], dict[str, float]]


def serve(begin: Callable[[dict[str, Any]], tuple[Answer, dict[str, str]]]) -> None:
    """Load with `begin`, which also gives versions, and answer until the input ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to the log

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    start = time.perf_counter()
    try:
        answer, versions = begin(json.loads(sys.argv[1]))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise
    say({"ready": {"versions": versions, "load_s": round(time.perf_counter() - start, 1)}})
    for line in sys.stdin:
        figures = answer(Case(**json.loads(line)["case"]))
        # Linux counts in KiB.
        figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        say({"figures": figures})
