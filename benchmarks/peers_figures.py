"""What peers.py makes of its figures: medians, and who is how much faster than whom."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any, Protocol

SPRINT = "sprint"  # the case in which all decode a few tokens by quick turns

Figures = dict[str, float]
Found = dict[str, dict[str, Figures]]  # "peer/precision" -> case -> medians


class Timed(Protocol):
    """A contestant, when all is over."""

    times: dict[str, list[Figures]]
    about: dict[str, Any]

    @property
    def name(self) -> str: ...


def medians(contestant: Timed) -> dict[str, Figures]:
    """Sum up each case."""
    return {
        name: {
            key: round(median(figures[key] for figures in times), 1)
            for key in ("first_ms", "step_ms")
        }
        for name, times in contestant.times.items()
    }


def ratios(found: Found, case: str) -> dict[str, Any]:
    """Divide the best of the others by ours, for the first token and a step: above one we win.

    A peer that decoded after words only is compared where the picture makes no difference.
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
            mine, best = min(ours, key=ours.__getitem__), min(others, key=others.__getitem__)
            ratio = round(others[best] / ours[mine], 2)
            compared[title] = {"ratio": ratio, "ours": mine, "best": best}
    return compared


def sprints(contestants: Sequence[Timed]) -> dict[str, Any]:
    """Divide the best of the others' steps by ours within each sprint, and take the median.

    Ours is the one that is fastest over all sprints; the quartiles say how far sprints differ.
    """
    steps = {
        c.name: [figures["step_ms"] for figures in c.times.get(SPRINT, ())] for c in contestants
    }
    ours = {name: times for name, times in steps.items() if times and name.startswith("ours/")}
    others = {name: times for name, times in steps.items() if times and name not in ours}
    if not ours or not others:
        return {}
    mine, best = (min(side, key=lambda n: median(side[n])) for side in (ours, others))
    pairs = [theirs / own for theirs, own in zip(others[best], ours[mine], strict=True)]
    return {
        "ratio": round(median(pairs), 2),
        "quartiles": [round(value, 2) for value in quantiles(pairs, n=4)[::2]],
        "ours": mine,
        "best": best,
        "sprints": len(pairs),
    }


def second(found: Found, case: str) -> dict[str, float]:
    """Divide the first token of a second question on a picture by one step, for each of ours."""
    return {
        name: round(by_case[f"{case}, again"]["first_ms"] / by_case[case]["step_ms"], 2)
        for name, by_case in found.items()
        if f"{case}, again" in by_case
    }


def summary(contestants: Sequence[Timed]) -> dict[str, Any]:
    """Collect a group's figures for the line of results.md."""
    found = {contestant.name: medians(contestant) for contestant in contestants}
    cases = dict.fromkeys(name for by_case in found.values() for name in by_case)
    peaks = {
        c.name: max(figures["peak_gib"] for times in c.times.values() for figures in times)
        for c in contestants
    }
    return {
        "found": found,
        "ratios": {c: got for c in cases if c != SPRINT and (got := ratios(found, c))},
        "sprints": sprints(contestants),
        "second": {case: got for case in cases if (got := second(found, case))},
        "peak_gib": {name: round(peak, 1) for name, peak in peaks.items()},
    }


def versions(contestants: Sequence[Timed]) -> dict[str, str]:
    """Say which release of everything took part."""
    return {n: v for c in contestants for n, v in c.about["versions"].items()}
