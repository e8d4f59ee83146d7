"""Formatting of training metrics as one line of text a report, for the terminal.

Training records show step, stage, epoch (of stages that read data), loss, throughput (tokens and
images per second), MFU (where the peak FLOPS of the device are known), the fraction of time spent
waiting for data, ETA, and loss and exact-match accuracy by family. Anomalies (bad samples, skipped
loss spikes, straggler ranks) are shown only when they occur. Evaluation records show validation
loss, vision gain, mini suite scores. `Heartbeat` fills the time until the first report.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from qwen2vl.cli import terminal

__all__ = ["Heartbeat", "ProgressFormatter"]

STRAGGLER_RATIO = 1.2  # of the mean over all ranks, from which on a rank is reported as slow
MIN_PHASE_SHARE = 0.05  # of the step time that a phase has to take to be reported

HEARTBEAT_SECONDS = 30.0

Record = Mapping[str, Any]


class ProgressFormatter:
    """Formats metrics; keeps the last step to compute the ETA."""

    def __init__(self, first_step: int = 0) -> None:
        """Start at `first_step`, the number of steps done before; 0 unless a run is resumed."""
        self._last_step = first_step

    def __call__(self, record: Record, seconds: float) -> str:
        """Format one record; `seconds` is the time since the start of the run."""
        is_training = "families" in record
        fields = self._format_training(record) if is_training else _format_evaluation(record)
        return f"{seconds / 60:6.1f} min  {'  '.join(fields)}"

    def _format_training(self, record: Record) -> Iterator[str]:
        yield f"{record['step']}/{record['steps']} {record['stage']}"
        if "epoch" in record:
            yield f"epoch {record['epoch']:.2f}"
        yield "loss -" if record["loss"] is None else f"loss {record['loss']:.3f}"
        yield f"{record['tokens_per_second']:,.0f} tok/s"
        yield f"{record['images_per_second']:,.0f} img/s"
        if "mfu" in record:
            yield f"MFU {record['mfu']:.1%}"
        yield f"wait {record['data_wait']:.0%}"
        if record["step"] < record["steps"]:
            step_seconds = record["seconds"] / (record["step"] - self._last_step)
            remaining = step_seconds * (record["steps"] - record["step"])
            yield f"ETA {terminal.format_duration(remaining)}"
        self._last_step = record["step"]
        yield from _format_anomalies(record)
        yield "| " + "  ".join(
            f"{name} {family['loss']:.3f}/{family['exact_match']:.0%}"
            for name, family in record["families"].items()
        )


class Heartbeat:
    """Writes to stderr, every half a minute, what a run is doing until its first report.

    A thread: loading a model, or the first step of a large one, may take minutes in one call. It
    writes with os.write, which takes no lock that a forked data worker could inherit.
    """

    def __init__(self, interval: float = HEARTBEAT_SECONDS) -> None:
        """Write every `interval` seconds."""
        self.activity = ""  # written to, by the main thread; empty: nothing is shown
        self._interval = interval
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """End the heartbeat; it may be called again."""
        self._stopped.set()

    def _run(self) -> None:
        start = time.monotonic()
        while not self._stopped.wait(self._interval):
            if self.activity:
                duration = terminal.format_duration(time.monotonic() - start)
                line = f"qwen2vl: {duration}: {self.activity}\n"
                with suppress(OSError, ValueError, AttributeError):  # stderr closed, or no file
                    os.write(sys.stderr.fileno(), line.encode())


def _format_anomalies(record: Record) -> Iterator[str]:
    for key, label in (("bad_samples", "bad samples"), ("skipped", "spikes skipped")):
        if record.get(key):
            yield f"{record[key]} {label}"
    for what, slow in record.get("slowest", {}).items():
        share = {"data_wait": record["data_wait"], "flops": 1.0}.get(what)
        share = record.get("phases", {}).get(what, 0.0) if share is None else share
        # The phase "data" is the same as "data_wait"; "other" has no single cause.
        if (
            what not in ("data", "other")
            and share > MIN_PHASE_SHARE
            and slow["over_mean"] > STRAGGLER_RATIO
        ):
            label = {"data_wait": "data", "flops": "work"}.get(what, what)
            yield f"slow: rank {slow['rank']} ({label} {slow['over_mean']:.1f}x)"


def _format_evaluation(record: Record) -> Iterator[str]:
    yield f"{record['step']} validation"
    if held_out := record.get("held_out"):
        yield f"loss {held_out['loss']:.3f}"
        if "vision_gain" in held_out:
            yield f"vision gain {held_out['vision_gain']:.3f}"
        yield "| " + "  ".join(
            _format_family(name, scores) for name, scores in held_out["families"].items()
        )
    if suite := record.get("mini"):
        yield "| mini " + "  ".join(_format_score(name, scores) for name, scores in suite.items())


def _format_family(name: str, scores: Mapping[str, float]) -> str:
    gain = f" gain {scores['vision_gain']:.3f}" if "vision_gain" in scores else ""
    return f"{name} {scores['loss']:.3f}{gain}"


def _format_score(name: str, scores: Mapping[str, float]) -> str:
    if "character_error_rate" in scores:
        return f"{name} {scores['character_error_rate']:.1%} CER"
    return f"{name} {scores['accuracy']:.0%}"
