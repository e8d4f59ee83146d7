"""A run's lines as a person reads them: where it is, how it learns, how fast, when it ends.

A line of training says step, loss, speed, the share of the hardware that is used (where its peak
is known), the share of time that data kept it waiting, and the time left; what should not happen
(bad samples, skipped steps, a rank that the others wait for) is said only when it does. A line of
a probe says what the model knows of conversations it does not learn from. Back up: train.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qwen2vl.cli import terminal

__all__ = ["Progress"]

SLOW = 1.2  # times the mean of all ranks: worth a word
SLOW_SHARE = 0.05  # of the time, that a phase has to take for that

Line = Mapping[str, Any]


class Progress:
    """Remembers the last step, from which follows how long the rest will take."""

    def __init__(self) -> None:
        self._last_step: int | None = None

    def __call__(self, line: Line, seconds: float) -> str:
        """Fit a line into one of text; `seconds` since the run was started."""
        told = "  ".join(self._training(line) if "families" in line else _probe(line))
        return f"{seconds / 60:6.1f} min  {told}"

    def _training(self, line: Line) -> Iterator[str]:
        yield f"{line['step']}/{line['steps']} {line['stage']}"
        yield "loss -" if line["loss"] is None else f"loss {line['loss']:.3f}"
        yield f"{line['tokens_per_second']:,.0f} tok/s"
        yield f"{line['pictures_per_second']:,.0f} img/s"
        if "mfu" in line:
            yield f"MFU {line['mfu']:.1%}"
        yield f"wait {line['data_wait']:.0%}"
        if self._last_step is not None and line["step"] < line["steps"]:
            each = line["seconds"] / (line["step"] - self._last_step)
            yield f"ETA {terminal.person_seconds(each * (line['steps'] - line['step']))}"
        self._last_step = line["step"]
        yield from _trouble(line)
        yield "| " + "  ".join(
            f"{name} {family['loss']:.3f}/{family['exact']:.0%}"
            for name, family in line["families"].items()
        )


def _trouble(line: Line) -> Iterator[str]:
    for key, words in (("bad_samples", "bad samples"), ("skipped", "spikes skipped")):
        if line.get(key):
            yield f"{line[key]} {words}"
    for what, slow in line.get("slowest", {}).items():
        share = {"waited": line["data_wait"], "operations": 1.0}.get(what)
        share = line.get("phases", {}).get(what, 0.0) if share is None else share
        # "waited" is what the phase of data is, and there is always something else to do.
        if what not in ("data", "other") and share > SLOW_SHARE and slow["over_mean"] > SLOW:
            word = {"waited": "data", "operations": "work"}.get(what, what)
            yield f"slow: rank {slow['rank']} ({word} {slow['over_mean']:.1f}x)"


def _probe(line: Line) -> Iterator[str]:
    yield f"{line['step']} held out"
    if found := line.get("held_out"):
        yield f"loss {found['loss']:.3f}"
        if "vision_gain" in found:
            yield f"vision gain {found['vision_gain']:.3f}"
        yield "| " + "  ".join(_family(name, row) for name, row in found["families"].items())
    if suite := line.get("mini"):
        yield "| mini " + "  ".join(_score(name, row) for name, row in suite.items())


def _family(name: str, row: Mapping[str, float]) -> str:
    gain = f" gain {row['vision_gain']:.3f}" if "vision_gain" in row else ""
    return f"{name} {row['loss']:.3f}{gain}"


def _score(name: str, row: Mapping[str, float]) -> str:
    if "character_errors" in row:
        return f"{name} {row['character_errors']:.1%} wrong"
    return f"{name} {row['share_right']:.0%}"
