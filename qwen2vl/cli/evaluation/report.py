"""Table and JSON object of the scores of a suite, and of their comparison with another run.

Shares are printed in percent. A part of a control is passed where its accuracy is no higher than
guessing explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qwen2vl.cli import terminal

if TYPE_CHECKING:
    from qwen2vl.eval.runner.comparison import PairedComparison
    from qwen2vl.eval.runner.scores import PartScore, RefusalScore, SuiteScores

__all__ = ["comparison_to_json", "print_comparison", "print_scores", "scores_to_json"]

TITLES = (
    *("part", "metric", "score", "95 % CI", "chance", "threshold", "goal", "passed", "questions"),
    "tokens",
)
REFUSAL_TITLES = (
    *("part", "refused (unanswerable)", "95 % CI", "questions"),
    *("refused (answerable)", "questions", "accuracy of answered", "questions"),
)
P_VALUES = "p: McNemar's exact test of accuracies; sign test of character error rates"
LEFT_ALIGNED = ("part", "metric")
METRIC_NAMES = {"accuracy": "accuracy", "character error rate": "CER"}


def print_scores(scores: SuiteScores) -> None:
    """Print the table, and what does not fit into it."""
    _print_table(TITLES, [_table_row(row) for row in scores.rows])
    refusals = [_refusal_row(row.part, row.refusals) for row in scores.rows if row.refusals]
    if refusals:
        terminal.echo("refusals of unanswerable and of answerable questions:")
        _print_table(REFUSAL_TITLES, refusals)
    exact = [
        f"{row.part} {_percent(row.results.accuracy)}"
        for row in scores.rows
        if row.check.metric == "character error rate"
    ]
    if exact:
        terminal.echo(
            f"CER: character error rate; lines read without any error: {', '.join(exact)}"
        )
    notes = {row.part: row.results.note for row in scores.rows if row.results.note}
    for note in dict.fromkeys(notes.values()):
        names = ", ".join(name for name, own in notes.items() if own == note)
        terminal.echo(f"{names}: {note}")
    if scores.similar is not None:
        similar = scores.similar
        terminal.echo(
            f"with similar names accepted: {_percent(similar.accuracy)} "
            f"({_interval(similar.interval)}), chance {_percent(similar.chance)}"
        )
    for other in dict.fromkeys(other for other, _ in scores.pairs):
        terminal.echo(f"compared with {other}, paired by item:")
        rows = [row for name, row in scores.pairs if name == other]
        _print_comparison_rows(rows, ("score", "compared with"))
    if scores.pairs:
        terminal.echo(P_VALUES)
    if scores.calibration is not None:
        known = scores.calibration
        terminal.echo(
            f"expected calibration error: {_percent(known.error)} (mean confidence "
            f"{_percent(known.confidence)}, exact answers {_percent(known.accuracy)})"
        )


def print_comparison(rows: Sequence[PairedComparison], other: str) -> None:
    """Print the paired comparison with another results file."""
    terminal.echo(f"compared with {terminal.escape_control_characters(other)}, paired by question:")
    _print_comparison_rows(rows, ("this run", "other"))
    terminal.echo(P_VALUES)


def _print_comparison_rows(rows: Sequence[PairedComparison], scores: tuple[str, str]) -> None:
    """Print a table; `scores` are the titles of the two scores that are compared."""
    lines = [
        (
            row.part,
            row.metric,
            str(row.count),
            _percent(row.score),
            _percent(row.other_score),
            f"{100 * row.difference:+.1f}",
            f"{100 * row.interval[0]:+.1f} to {100 * row.interval[1]:+.1f}",
            str(row.num_better),
            str(row.num_worse),
            f"{row.p_value:.2g}",
        )
        for row in rows
    ]
    titles = (
        *("part", "metric", "pairs", *scores, "difference", "95 % CI"),
        *("better", "worse", "p"),
    )
    terminal.echo_table(titles, lines, left_aligned=LEFT_ALIGNED)


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table without the columns that are empty in all rows."""
    used = [column for column in range(len(titles)) if any(row[column] for row in rows)]
    terminal.echo_table(
        [titles[column] for column in used],
        [tuple(row[column] for column in used) for row in rows],
        left_aligned=LEFT_ALIGNED,
    )


def scores_to_json(scores: SuiteScores) -> dict[str, Any]:
    """Convert the scores to JSON values; `accuracy` is reported for every part."""
    calibration, similar = scores.calibration, scores.similar
    return {
        "parts": [_part_to_json(row) for row in scores.rows],
        "similar_names": None if similar is None else asdict(similar),
        "calibration": None if calibration is None else asdict(calibration),
        "pairs": [{"compared_with": other, **asdict(row)} for other, row in scores.pairs],
    }


def comparison_to_json(rows: Sequence[PairedComparison]) -> list[dict[str, Any]]:
    """Convert a comparison to JSON values."""
    return [asdict(row) for row in rows]


def _part_to_json(row: PartScore) -> dict[str, Any]:
    check = row.check
    return {
        "part": row.part,
        "metric": check.metric,
        "score": check.score,
        "interval": check.interval,
        "chance": row.chance,
        "threshold": check.limit,
        "goal": check.goal,
        "lower_is_better": check.lower_is_better,
        "passed": check.passed,
        "accuracy": row.results.accuracy,
        "num_examples": row.results.num_examples,
        "prompt_tokens": row.prompt_tokens,
        "refusals": None if row.refusals is None else asdict(row.refusals),
        "note": row.results.note,
    }


def _table_row(row: PartScore) -> tuple[str, ...]:
    check = row.check
    sign = "<=" if check.lower_is_better else ">="
    return (
        row.part,
        METRIC_NAMES[check.metric],
        _percent(check.score),
        _interval(check.interval),
        _percent(row.chance) if check.metric == "accuracy" else "",
        _percent(check.limit, sign),
        _percent(check.goal, sign),
        {None: "", True: "yes", False: "NO"}[check.passed],
        str(row.results.num_examples),
        "" if row.prompt_tokens is None else f"{row.prompt_tokens:,.0f}",
    )


def _refusal_row(part: str, refusals: RefusalScore) -> tuple[str, ...]:
    return (
        part,
        _percent(refusals.refused),
        _interval(refusals.refused_interval),
        str(refusals.num_unanswerable),
        _percent(refusals.wrongly_refused),
        str(refusals.num_answerable),
        _percent(refusals.answered_accuracy),
        str(refusals.num_answered),
    )


def _interval(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * low:.1f} - {100 * high:.1f}"


def _percent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f"{sign} {100 * share:.1f} %".strip()
