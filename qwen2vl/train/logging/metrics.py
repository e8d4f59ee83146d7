"""What a run tells: one JSON line for each report, with a line's worth for every family.

Sums are kept between reports and divided once, so that a mean is a mean over targets, not over
batches; with several ranks, over those of all. Nothing here waits for the device until a report
is made. The library does not print: reports go to a JSON lines file, to sinks and to whoever
listens. Next room: loop.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.parallel.mesh import Ranks
from qwen2vl.synth import FAMILIES
from qwen2vl.train.config import TrainConfig
from qwen2vl.train.flops import Costs, Flops
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.logging.accumulator import Row, Sums, Tally, read
from qwen2vl.train.logging.loggers import Sink
from qwen2vl.train.logging.step_timer import PHASES, PhaseClock
from qwen2vl.train.loss import Outcome

__all__ = ["Metrics", "families_of"]

ALONE = Ranks(torch.device("cpu"))
FREE = Flops(0, 0)


def families_of(config: TrainConfig) -> list[str]:
    """List every family that a run can meet: all ranks need the same list."""
    labels = {
        source.label
        for stage in config.stages
        if stage.data is not None
        for source in stage.data.sources
    }
    return sorted({*FAMILIES, *labels})


class Metrics:
    """Sums since the last report."""

    def __init__(
        self,
        path: Path,
        *,
        ranks: Ranks = ALONE,
        families: Sequence[str] | None = None,
        sinks: Sequence[Sink] = (),
        peak: float | None = None,
    ) -> None:
        """Begin to sum; the first of `ranks` writes.

        Args:
            path: the file of JSON lines, which is appended to.
            ranks: of the run; their sums are added at each report, so all of them must report.
            families: all that any rank can meet; None: those that come, for a run of one.
            sinks: also hear every line.
            peak: operations a second of one device, for MFU and HFU.
        """
        assert families is not None or ranks.size == 1, "ranks must agree on their families"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.costs: Costs | None = None  # of the model as it is frozen now; the trainer sets it
        self.clock = PhaseClock(ranks.device)
        self._ranks, self._families, self._sinks, self._peak = ranks, families, sinks, peak
        self._bad = 0
        self._clear()

    def _clear(self) -> None:
        self._began = time.perf_counter()
        self._tally = Tally()

    def enter(self, phase: str) -> None:
        """Say that a phase of the step begins: data, forward, backward, optimizer or other."""
        self.clock.enter(phase)

    def add(self, batch: Batch, outcome: Outcome, norm: Tensor, waited: float) -> None:
        """Count one batch, with the norm of its step's gradients; asks the device for nothing."""
        cost = FREE if self.costs is None else self.costs.of_batch(batch)
        self._tally.add(batch, outcome, norm, waited, cost)

    def sums(self) -> Tensor:
        """Give everything since the last report as one vector, to be added up over ranks."""
        return self._tally.vector(
            self._names, self.clock.take_seconds(), self._ranks.rank, self._ranks.size
        )

    def line(self, sums: Tensor) -> dict[str, Any]:
        """Turn a vector, this rank's or the sum of all, into what a report says."""
        seconds = time.perf_counter() - self._began
        found = read(sums, self._names, self._ranks.size)
        self._bad += int(found.counts["bad"])
        return {
            **_means(found),
            **_speeds(found, seconds),
            **self._shares_of_peak(found, seconds),
            **_times(found.ranks, seconds),
            "bad_samples": self._bad,
            "families": {family: _of_family(row) for family, row in found.families.items()},
        }

    def report(self, **facts: Any) -> dict[str, Any]:
        """Write one line, forget the sums, and return the line."""
        line = {**facts, **self.line(self._ranks.sum(self.sums()))}
        self._write(line)
        self._clear()
        return line

    def look(self, step: int, probe: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Write a line of what `probe` finds; the time it takes counts for no speed."""
        with self._paused():
            line = {"step": step, **probe()}
        self._write(line)
        return line

    @property
    def _names(self) -> Sequence[str]:
        return self._tally.families if self._families is None else self._families

    @contextmanager
    def _paused(self) -> Iterator[None]:
        start = time.perf_counter()
        with self.clock.stopped():
            yield
        self._began += time.perf_counter() - start

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._ranks.rank:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for sink in self._sinks:
            sink(line)

    def _shares_of_peak(self, found: Sums, seconds: float) -> dict[str, float]:
        """Say what of the devices' speed was put to use; nothing where costs are unknown."""
        model, again = found.counts["model"], found.counts["again"]
        if not model:
            return {}
        speeds = {"flops_per_second": model / seconds}
        if self._peak is not None:
            whole = seconds * self._peak * self._ranks.size
            speeds |= {"mfu": model / whole, "hfu": (model + again) / whole}
        return speeds


def _means(found: Sums) -> dict[str, Any]:
    targets = sum(row["targets"] for row in found.families.values())
    loss = sum(row["loss"] for row in found.families.values())
    # Where every sample was bad there is nothing to take a mean of.
    return {
        "loss": loss / targets if targets else None,
        "grad_norm": found.counts["norm"] / max(1.0, found.counts["batches"]),
    }


def _speeds(found: Sums, seconds: float) -> dict[str, float]:
    """Count by the second; a clip counts as a picture for each pair of its frames."""
    named = ("examples", "tokens", "patches", "pictures")
    speeds = {f"{name}_per_second": found.counts[name] / seconds for name in named}
    return {"seconds": seconds, **speeds}


def _times(ranks: Sequence[Row], seconds: float) -> dict[str, Any]:
    """Give shares of time, and where ranks differ, the one that the others wait for.

    Inside forward and backward the ranks of a sharded run wait for each other, so a slow one is
    seen in its own work: data, or more operations than the others got.
    """
    times: dict[str, Any] = {"data_wait": max(row["waited"] for row in ranks) / seconds}
    if any(row[phase] for row in ranks for phase in PHASES):
        whole = len(ranks) * seconds
        times["phases"] = {phase: sum(row[phase] for row in ranks) / whole for phase in PHASES}
    if len(ranks) > 1:
        named = ("waited", *PHASES, "operations")
        times["slowest"] = {n: _slowest([row[n] for row in ranks]) for n in named}
    return times


def _slowest(values: Sequence[float]) -> dict[str, float]:
    top, mean = max(values), sum(values) / len(values)
    return {"rank": values.index(top), "over_mean": top / mean if mean else 1.0}


def _of_family(row: Row) -> dict[str, float]:
    targets, answers = max(1.0, row["targets"]), row["answers"]
    return {
        "loss": row["loss"] / targets,
        "token_accuracy": row["hits"] / targets,
        "exact": row["whole"] / answers,
        "examples": int(answers),
    }
