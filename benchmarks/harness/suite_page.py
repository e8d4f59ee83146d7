"""The page docs/suite-results.md: tables of each suite, from the rows in benchmarks/suites.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["PAGE", "render_page"]

PAGE = Path("docs") / "suite-results.md"
BLIND = "blind"  # column of the control
Row = Mapping[str, Any]

HEAD = """# Results by suite

<!-- Written by `python benchmarks/suites.py`; do not edit. -->

nano, its blind control and peers on the same items, in percent. Accuracies are shown with their
95 % intervals; of text recognition the character error rate is shown, where lower is better.
*Chance* is the accuracy of the best answer that does not look at the picture; *blind* is nano,
asked about the picture of another item of the same kind: it should not be above *limit*, which is
chance plus three standard deviations. [Evaluate](guides/evaluate.md#on-suites) says what each suite
measures, how it is scored, and what it cannot show.

```sh
python benchmarks/suites.py out/suites
```
"""
HEAD_NOTE = "<!-- not tested: needs data -->\n"


def render_page(rows: Sequence[Row]) -> str:
    """Return the page."""
    head = HEAD.replace("```sh\n", f"{HEAD_NOTE}```sh\n")
    suites = dict.fromkeys(row["suite"] for row in rows)
    sections = [_section(suite, [r for r in rows if r["suite"] == suite]) for suite in suites]
    return "\n".join([head, *sections])


def _section(suite: str, rows: Sequence[Row]) -> str:
    shown = [row for row in rows if row["column"] != BLIND]
    controls = {row["part"]: row for row in rows if row["column"] == BLIND}
    blocks = [f"## {suite}\n"]
    for metric in ("accuracy", "character error rate"):
        if own := [row for row in shown if row["metric"] == metric]:
            blocks.append(_score_table(metric, own, controls))
    if refusals := [row for row in shown if row["refusals"]]:
        blocks.append(_refusal_table(refusals))
    errors = {row["column"]: row["calibration_error"] for row in shown}
    if known := [f"{name} {_percent(e)}" for name, e in errors.items() if e is not None]:
        blocks.append(f"Expected calibration error: {', '.join(known)}.\n")
    return "\n".join(blocks)


def _score_table(metric: str, rows: Sequence[Row], controls: Mapping[str, Row]) -> str:
    """Return the table of the parts with one metric; controls are measured by accuracy."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    columns = list(dict.fromkeys(row["column"] for row in rows))
    by_cell = {
        cell: _better([r for r in rows if (r["part"], r["column"]) == cell])
        for cell in ((part, column) for part in parts for column in columns)
    }
    tokens = {row["part"]: row["prompt_tokens"] for row in rows if row["prompt_tokens"]}
    is_accuracy = metric == "accuracy"
    titles = [f"part ({metric})", "items", *(["prompt tokens"] if tokens else []), *columns]
    titles += ["chance", "blind", "limit"] if is_accuracy else []
    lines = [_line(titles), _line(["---", *["--:"] * (len(titles) - 1)])]
    for part in parts:
        cells = [by_cell[part, column] for column in columns]
        first = next(cell for cell in cells if cell is not None)
        line = [f"`{part}`", f"{first['num_examples']:,}"]
        line += [f"{tokens[part]:,.0f}" if part in tokens else ""] if tokens else []
        line += ["" if cell is None else _score(cell) for cell in cells]
        line += _control_cells(first, controls.get(part)) if is_accuracy else []
        lines.append(_line(line))
    return "\n".join(lines) + "\n"


def _better(rows: Sequence[Row]) -> Row | None:
    """Return the best of several runs of one peer, which differ in the scale of the picture."""
    if not rows:
        return None
    is_error_rate = rows[0]["metric"] != "accuracy"
    return min(rows, key=lambda row: row["score"] if is_error_rate else -row["score"])


def _control_cells(row: Row, blind: Row | None) -> list[str]:
    chance = f"{100 * row['chance']:.1f}"
    if blind is None:
        return [chance, "", f"{100 * row['limit']:.1f}" if row["limit"] else ""]
    return [chance, f"{100 * blind['score']:.1f}", f"{100 * blind['limit']:.1f}"]


def _refusal_table(rows: Sequence[Row]) -> str:
    titles = ["part", "by", "refused (unanswerable)", "refused (answerable)"]
    titles += ["accuracy of answered", "answered"]
    lines = [_line(titles), _line(["---", "---", *["--:"] * 4])]
    for row in rows:
        own = row["refusals"]
        accuracy = own["answered_accuracy"]
        lines.append(
            _line(
                [
                    f"`{row['part']}`",
                    row["column"],
                    f"{_percent(own['refused'])} of {own['num_unanswerable']}",
                    f"{_percent(own['wrongly_refused'])} of {own['num_answerable']}",
                    "" if accuracy is None else _percent(accuracy),
                    f"{own['num_answered']}",
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _score(row: Row) -> str:
    low, high = row["interval"]
    return f"{100 * row['score']:.1f} ({100 * low:.1f} - {100 * high:.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
