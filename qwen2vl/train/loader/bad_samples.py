"""Bad samples: counted by reason, listed in a file, and too many of them end the run.

    runs/nano/bad_samples.jsonl   {"step": 12, "id": "rows.jsonl:17", "source": "rows", ...}

A sample that cannot be used leaves its place empty; nothing else is shown instead, so what a step
sees stays a function of its number. What was known and accepted before the run is listed, not
counted. Each rank keeps its own list. It must not know why a sample is bad. Next room: batches.py.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from qwen2vl.data.config import DataConfig
from qwen2vl.errors import InputError
from qwen2vl.train.loader.batch import Batch

__all__ = ["BadSamples"]

NAMED = 3  # that an error names


class BadSamples:
    """What was seen and what turned out bad since this process began."""

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        name = f"bad_samples-{rank:05d}.jsonl" if rank else "bad_samples.jsonl"
        self.path = folder / name
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self._last: list[str] = []

    def take(self, batch: Batch, step: int, data: DataConfig, total: int) -> None:
        """List what is bad in one batch, and count what was not known before.

        Args:
            batch: of the step.
            step: counted from 1.
            data: what the stage reads; it says how many may be bad.
            total: samples that there are to read.

        Raises:
            InputError: they are too many; counted by reason.
        """
        fresh = [sample for sample in batch.bad if not sample.known]
        self.seen += len(batch.families) + len(fresh)
        if not batch.bad:
            return
        self.reasons.update(sample.reason for sample in fresh)
        self._last = [f"{sample.id}: {sample.text}" for sample in fresh[:NAMED]] or self._last
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for sample in batch.bad:
                file.write(json.dumps({"step": step, **sample._asdict()}) + "\n")
        if not data.tolerates(self.reasons.total(), self.seen, total):
            kinds = ", ".join(f"{count:,} {name}" for name, count in self.reasons.most_common())
            raise InputError(
                f"step {step}: {self.reasons.total():,} of {self.seen:,} samples are bad ({kinds}),"
                f" the limit is {data.max_bad:.2%}; {'; '.join(self._last)}; all are in "
                f"{self.path}: mend them, or raise data.max_bad"
            )
