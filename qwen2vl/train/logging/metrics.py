"""Training metrics: one JSON record per report, with loss and accuracy of every task family.

Sums are accumulated between reports and divided once, so that a mean is over targets, not over
batches, and over all ranks. There is no device sync until a report. The library does not print:
records are written to a JSON lines file and passed to loggers; `report` also returns them.
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

from qwen2vl.flops import FlopCounter, Flops
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.synth import FAMILIES
from qwen2vl.train.config import TrainConfig
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.logging.accumulator import MetricAccumulator, MetricSums, Values, unpack_sums
from qwen2vl.train.logging.loggers import MetricLogger
from qwen2vl.train.logging.step_timer import PHASES, StepTimer
from qwen2vl.train.loss import LossOutput

__all__ = ["Metrics", "metric_families"]

SINGLE_PROCESS = DistributedContext(torch.device("cpu"))
NO_FLOPS = Flops(0, 0)


def metric_families(config: TrainConfig) -> list[str]:
    """List every family that can occur in a run; all ranks need the same list."""
    labels = {
        source.label
        for stage in config.stages
        if stage.data is not None
        for source in stage.data.sources
    }
    return sorted({*FAMILIES, *labels})


class Metrics:
    """Accumulates the metrics of a run and writes a record at each report."""

    def __init__(
        self,
        path: Path,
        *,
        distributed: DistributedContext = SINGLE_PROCESS,
        families: Sequence[str] | None = None,
        loggers: Sequence[MetricLogger] = (),
        peak_flops: float | None = None,
    ) -> None:
        """Start accumulating; rank 0 of `distributed` writes.

        Args:
            path: of the JSON lines file, which is appended to.
            distributed: of the run; sums are reduced at each report, so all ranks must report.
            families: all that can occur on any rank; None: those that occur, for a single process.
            loggers: called with every record.
            peak_flops: FLOPs per second of one device, for MFU and HFU.
        """
        assert families is not None or distributed.world_size == 1, "ranks need the same families"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # Of the model with its current trainable parameters; set by the training loop.
        self.flop_counter: FlopCounter | None = None
        self.timer = StepTimer(distributed.device)
        self._distributed, self._families, self._loggers, self._peak_flops = (
            distributed,
            families,
            loggers,
            peak_flops,
        )
        self._num_bad = 0  # distinct ones, of each rank
        self._seen_bad: set[tuple[str, str]] = set()  # of this rank
        self._reset()

    def _reset(self) -> None:
        self._start_time = time.perf_counter()
        self._accumulator = MetricAccumulator(self._seen_bad)

    @property
    def seconds(self) -> float:
        """The time since the last report, on this rank, without evaluations."""
        return time.perf_counter() - self._start_time

    def start_phase(self, phase: str) -> None:
        """Start a phase of the step: data, forward, backward, optimizer or other."""
        self.timer.start(phase)

    def add(self, batch: Batch, output: LossOutput, grad_norm: Tensor, data_wait: float) -> None:
        """Add one batch and the gradient norm of its step, without a device sync."""
        counter = self.flop_counter
        cost = NO_FLOPS if counter is None else counter.count(batch.flop_counts())
        self._accumulator.add(batch, output, grad_norm, data_wait, cost)

    def sums(self) -> Tensor:
        """Return the sums since the last report as one vector, to be reduced over ranks."""
        return self._accumulator.to_vector(
            self._family_names,
            self.timer.pop_seconds(),
            self._distributed.rank,
            self._distributed.world_size,
        )

    def summarize(self, vector: Tensor) -> dict[str, Any]:
        """Compute the metrics of a record from a vector, of this rank or reduced over all."""
        seconds = self.seconds
        sums = unpack_sums(vector, self._family_names, self._distributed.world_size)
        self._num_bad += int(sums.counts["bad"])
        return {
            **_mean_values(sums),
            **_throughput(sums, seconds),
            **self._utilization(sums, seconds),
            **_time_shares(sums.ranks, seconds),
            "bad_samples": self._num_bad,
            "families": {family: _family_metrics(row) for family, row in sums.families.items()},
        }

    def report(self, **fields: Any) -> dict[str, Any]:
        """Write one record, reset the sums, and return the record."""
        record = {**fields, **self.summarize(self._distributed.all_reduce(self.sums()))}
        self._write(record)
        self._reset()
        return record

    def log_evaluation(
        self, step: int, evaluate: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Write a record of what `evaluate` returns; its time is excluded from throughput.

        Nothing is written where nothing was evaluated, since a stage has no held-out data.
        """
        with self._timers_paused():
            results = evaluate()
        record = {"step": step, **results}
        if results:
            self._write(record)
        return record

    @contextmanager
    def _timers_paused(self) -> Iterator[None]:
        """Exclude the time inside the context from throughput and from the phases of a step."""
        start = time.perf_counter()
        with self.timer.paused():
            yield
        self._start_time += time.perf_counter() - start

    @property
    def _family_names(self) -> Sequence[str]:
        return self._accumulator.families if self._families is None else self._families

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._distributed.rank:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for logger in self._loggers:
            logger(record)

    def _utilization(self, sums: MetricSums, seconds: float) -> dict[str, float]:
        """Return achieved FLOPs, MFU and HFU; empty if the FLOPs of a batch are unknown."""
        model, recompute = sums.counts["model_flops"], sums.counts["recompute_flops"]
        if not model:
            return {}
        utilization = {"flops_per_second": model / seconds}
        if self._peak_flops is not None:
            available = seconds * self._peak_flops * self._distributed.world_size
            utilization |= {"mfu": model / available, "hfu": (model + recompute) / available}
        return utilization


def _mean_values(sums: MetricSums) -> dict[str, Any]:
    targets = sum(row["targets"] for row in sums.families.values())
    loss = sum(row["loss"] for row in sums.families.values())
    # If every sample was bad there are no targets.
    return {
        "loss": loss / targets if targets else None,
        "grad_norm": sums.counts["grad_norm"] / max(1.0, sums.counts["batches"]),
    }


def _throughput(sums: MetricSums, seconds: float) -> dict[str, float]:
    """Return counts per second; a video counts as one image for each pair of its frames."""
    names = ("examples", "tokens", "patches", "images")
    throughput = {f"{name}_per_second": sums.counts[name] / seconds for name in names}
    return {"seconds": seconds, **throughput}


def _time_shares(ranks: Sequence[Values], seconds: float) -> dict[str, Any]:
    """Return shares of time, and with several ranks the slowest one of each phase (straggler).

    Inside forward and backward the ranks of a sharded run wait for each other, so a slow rank shows
    in its own work: in data, or in more FLOPs than the others have.
    """
    times: dict[str, Any] = {"data_wait": max(row["data_wait"] for row in ranks) / seconds}
    if any(row[phase] for row in ranks for phase in PHASES):
        total = len(ranks) * seconds
        times["phases"] = {phase: sum(row[phase] for row in ranks) / total for phase in PHASES}
    if len(ranks) > 1:
        names = ("data_wait", *PHASES, "flops")
        times["slowest"] = {name: _slowest([row[name] for row in ranks]) for name in names}
    return times


def _slowest(values: Sequence[float]) -> dict[str, float]:
    maximum, mean = max(values), sum(values) / len(values)
    return {"rank": values.index(maximum), "over_mean": maximum / mean if mean else 1.0}


def _family_metrics(row: Values) -> dict[str, float]:
    targets, num_examples = max(1.0, row["targets"]), row["examples"]
    return {
        "loss": row["loss"] / targets,
        "token_accuracy": row["correct"] / targets,
        "exact_match": row["exact_matches"] / num_examples,
        "examples": int(num_examples),
    }
