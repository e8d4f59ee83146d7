"""Bad samples of a run: listed in a file, counted by reason; too many of them end the run.

    runs/nano/bad_samples.jsonl   {"step": 12, "id": "rows.jsonl:17", "source": "rows", ...}

A bad sample is not replaced by another, so that the samples of a step remain a function of its
number. Samples that were known to be bad before the run are listed, but not counted. Each rank has
its own list.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from qwen2vl.data.bin_planner import describe_remedy
from qwen2vl.data.config import DataConfig
from qwen2vl.data.formats import describe_reasons
from qwen2vl.errors import InputError
from qwen2vl.train.loader.batch import Batch

__all__ = ["BadSampleTracker"]

MAX_NAMED_SAMPLES = 3  # that an error lists


class BadSampleTracker:
    """The number of samples seen and the bad ones among them, since this process began."""

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        name = f"bad_samples-{rank:05d}.jsonl" if rank else "bad_samples.jsonl"
        self.path = folder / name
        self.num_seen = 0
        self.reasons: Counter[str] = Counter()
        self._last_named: list[str] = []

    def record(self, batch: Batch, step: int, data: DataConfig, num_total: int) -> None:
        """List the bad samples of one batch, and count those not known to be bad before.

        Args:
            batch: of the step.
            step: counted from 1.
            data: the stage's data config, which has the limit.
            num_total: samples of the stage's dataset.

        Raises:
            InputError: more are bad than the limit; counted by reason.
        """
        new_bad = [sample for sample in batch.bad_samples if not sample.known]
        self.num_seen += len(batch.families) + len(new_bad)
        if not batch.bad_samples:
            return
        self.reasons.update(sample.reason for sample in new_bad)
        self._last_named = [
            f"{sample.id}: {sample.text}" for sample in new_bad[:MAX_NAMED_SAMPLES]
        ] or self._last_named
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for sample in batch.bad_samples:
                file.write(json.dumps({"step": step, **sample._asdict()}) + "\n")
        if not data.tolerates(self.reasons.total(), self.num_seen, num_total):
            num_bad = self.reasons.total()
            raise InputError(
                f"step {step}: {num_bad:,} of {self.num_seen:,} samples are bad "
                f"({describe_reasons(self.reasons)}), the limit is {data.max_bad_fraction:.2%}; "
                f"{'; '.join(self._last_named)}; all are in {self.path}: "
                f"{describe_remedy(num_bad, self.num_seen)}"
            )
