"""Statistics of peers.py: medians, and latency ratios of the best peer to the best of ours."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any, Protocol

PAIRED_RUNS = "sprint"  # key of the interleaved paired runs in results.md

Figures = dict[str, float]
MedianFigures = dict[str, dict[str, Figures]]  # "peer/precision" -> case -> medians


class MeasuredRun(Protocol):
    """A peer run with its measurements."""

    times: dict[str, list[Figures]]
    about: dict[str, Any]

    @property
    def name(self) -> str: ...


def medians(peer_run: MeasuredRun) -> dict[str, Figures]:
    """Return the median of each measurement by case."""
    return {
        name: {
            key: round(median(figures[key] for figures in times), 1)
            for key in ("first_ms", "step_ms")
        }
        for name, times in peer_run.times.items()
    }


def ratios(found: MedianFigures, case: str) -> dict[str, Any]:
    """Compute the ratio best peer / best of ours for TTFT and step; above 1, ours is faster.

    A peer that decoded after a text prompt of the same length is included in the step ratio only.
    """
    compared: dict[str, Any] = {}
    for title in ("first", "step"):
        cases = (case, f"{case}, words only") if title == "step" else (case,)
        times = {
            name: figures[f"{title}_ms"]
            for name, by_case in found.items()
            for label, figures in by_case.items()
            if label in cases
        }
        ours = {name: value for name, value in times.items() if name.startswith("ours/")}
        others = {name: value for name, value in times.items() if name not in ours}
        if ours and others:
            fastest, best = min(ours, key=ours.__getitem__), min(others, key=others.__getitem__)
            ratio = round(others[best] / ours[fastest], 2)
            compared[title] = {"ratio": ratio, "ours": fastest, "best": best}
    return compared


def paired_runs(peer_runs: Sequence[MeasuredRun]) -> dict[str, Any]:
    """Compute the median ratio best peer / ours of the step times within each paired run.

    Ours and the best peer are those with the lowest median; the quartiles show the variation.
    """
    steps = {
        run.name: [figures["step_ms"] for figures in run.times.get(PAIRED_RUNS, ())]
        for run in peer_runs
    }
    ours = {name: times for name, times in steps.items() if times and name.startswith("ours/")}
    others = {name: times for name, times in steps.items() if times and name not in ours}
    if not ours or not others:
        return {}
    fastest, best = (min(side, key=lambda n: median(side[n])) for side in (ours, others))
    pairs = [peer / ours_step for peer, ours_step in zip(others[best], ours[fastest], strict=True)]
    return {
        "ratio": round(median(pairs), 2),
        "quartiles": [round(value, 2) for value in quantiles(pairs, n=4)[::2]],
        "ours": fastest,
        "best": best,
        "pairs": len(pairs),
    }


def second_prompt_ratios(found: MedianFigures, case: str) -> dict[str, float]:
    """Compute TTFT of a second prompt on the same image / step time, for each of ours."""
    return {
        name: round(by_case[f"{case}, again"]["first_ms"] / by_case[case]["step_ms"], 2)
        for name, by_case in found.items()
        if f"{case}, again" in by_case
    }


def summary(peer_runs: Sequence[MeasuredRun]) -> dict[str, Any]:
    """Collect the statistics of a group for its line of results.md."""
    found = {peer_run.name: medians(peer_run) for peer_run in peer_runs}
    cases = dict.fromkeys(name for by_case in found.values() for name in by_case)
    peaks = {
        c.name: max(figures["peak_gib"] for times in c.times.values() for figures in times)
        for c in peer_runs
    }
    return {
        "found": found,
        "ratios": {c: got for c in cases if c != PAIRED_RUNS and (got := ratios(found, c))},
        "paired_steps": paired_runs(peer_runs),
        "second": {case: got for case in cases if (got := second_prompt_ratios(found, case))},
        "peak_gib": {name: round(peak, 1) for name, peak in peaks.items()},
    }


def versions(peer_runs: Sequence[MeasuredRun]) -> dict[str, str]:
    """Return the versions of all packages that were measured."""
    return {n: v for c in peer_runs for n, v in c.about["versions"].items()}
