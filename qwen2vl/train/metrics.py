"""What a run tells: one JSON line for each report, with a line's worth for every family.

Sums are kept between reports and divided once, so that a mean is a mean over targets, not over
batches. The library does not print: reports go to a JSONL file and to whoever listens.
Next room: loop.py.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from qwen2vl.train.objective import Outcome
from qwen2vl.train.pack import Batch

__all__ = ["Metrics"]


class Metrics:
    """Sums since the last report."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0  # seconds in which the step stood still for data
        self.steps = self.examples = self.tokens = self.patches = 0
        self.norm = torch.zeros(())
        # family -> [sum of losses, targets, right targets, answers, answers right as a whole]
        self.families: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)

    def add(self, batch: Batch, outcome: Outcome, norm: torch.Tensor, waited: float) -> None:
        """Count one step."""
        self.steps += 1
        self.waited += waited
        self.examples += len(batch.families)
        self.tokens += len(batch.input_ids_T)
        self.patches += 0 if batch.patches_NP is None else len(batch.patches_NP)
        self.norm = self.norm + norm
        num = len(batch.families)
        zeros = torch.zeros(num, device=batch.owner_R.device)
        losses = zeros.index_add(0, batch.owner_R, outcome.losses_R.float())
        right = zeros.index_add(0, batch.owner_R, outcome.right_R.float())
        count = torch.bincount(batch.owner_R, minlength=num)
        rows = zip(batch.families, losses.tolist(), count.tolist(), right.tolist(), strict=True)
        for family, loss, targets, hits in rows:
            sums = self.families[family]
            for i, value in enumerate((loss, targets, hits, 1, hits == targets)):
                sums[i] += value

    def report(self, **facts: Any) -> dict[str, Any]:
        """Write one line, forget the sums, and return the line."""
        seconds = time.perf_counter() - self.began
        totals = [sum(values) for values in zip(*self.families.values(), strict=True)]
        line = {
            **facts,
            "loss": totals[0] / totals[1],
            "grad_norm": float(self.norm) / self.steps,
            "examples_per_second": self.examples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "patches_per_second": self.patches / seconds,
            "data_wait": self.waited / seconds,
            "families": {
                family: {
                    "loss": loss / targets,
                    "token_accuracy": hits / targets,
                    "exact": whole / answers,
                    "examples": int(answers),
                }
                for family, (loss, targets, hits, answers, whole) in sorted(self.families.items())
            },
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._clear()
        return line
