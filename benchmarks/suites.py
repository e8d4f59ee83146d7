"""Run all suites: a model, its blind control and peers on the same items; write the results page.

    qwen2vl fetch-data easy-vqa named-pictures fashion-mnist photos test-fonts rapidocr \
        efficientnet-lite0
    python benchmarks/suites.py out/suites [--suite NAME ...] [--model DIR] [--limit N]
    python benchmarks/suites.py out/suites --page        only the page, from suites.json

Every run has a results file in the folder, which the same command continues. Scores are kept in
benchmarks/suites.json, from which docs/suite-results.md is written; parts and peers whose datasets
or programs are absent keep their earlier scores. With --limit or another model nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.suite_page import PAGE, render_page
from harness.suite_peers import peer_runs
from harness.suite_runs import execute, model_runs
from record import ROOT, format_result

from qwen2vl.errors import Qwen2VLError
from qwen2vl.eval.suites.registry import SUITE_NAMES, open_suite

SCORES = ROOT / "benchmarks" / "suites.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the results files")
    parser.add_argument("--suite", action="append", choices=SUITE_NAMES, help="default: all")
    parser.add_argument("--model", default="nano", help="folder, repo id or nano")
    parser.add_argument("--limit", type=int, help="only the first LIMIT items of each part")
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in () if args.page else args.suite or SUITE_NAMES:
        rows += run_suite(name, args.model, args.folder, args.limit)
    if args.limit or args.model != "nano":
        print(json.dumps(rows, indent=1))
        return
    if rows:
        SCORES.write_text(dump_rows(merge_rows(load_rows(), rows)), encoding="utf-8")
        print(format_result(summarize(rows)))
    (ROOT / PAGE).write_text(render_page(load_rows()), encoding="utf-8")


def run_suite(name: str, model: str, folder: Path, limit: int | None) -> list[dict[str, Any]]:
    """Run a suite by all that can answer it; a suite that was not fetched is left out."""
    try:
        suite = open_suite(name)
    except Qwen2VLError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return []
    rows: list[dict[str, Any]] = []
    for run in (*model_runs(suite, model), *peer_runs(suite)):
        try:
            rows += [asdict(row) for row in execute(suite, run, folder, limit)]
        except Qwen2VLError as error:  # such as a results file of another version of a program
            print(f"{name} {run.name} is left out: {error}", file=sys.stderr)
    return rows


def load_rows() -> list[dict[str, Any]]:
    """Read the scores that are kept."""
    return json.loads(SCORES.read_text(encoding="utf-8")) if SCORES.is_file() else []


def merge_rows(kept: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace the scores of the same suite, part and run; those of other items are dropped."""
    digests = {row["suite"]: row["digest"] for row in [*kept, *new]}
    kept = [row for row in kept if row["digest"] == digests[row["suite"]]]
    merged = {(row["suite"], row["run"], row["part"]): row for row in [*kept, *new]}
    order = {name: index for index, name in enumerate(SUITE_NAMES)}
    return sorted(merged.values(), key=lambda row: order[row["suite"]])


def dump_rows(rows: list[dict[str, Any]]) -> str:
    """Write one row a line, so that a change of a score is a change of a line."""
    lines = ",\n".join(json.dumps(_rounded(row)) for row in rows)
    return f"[\n{lines}\n]\n"


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores by suite, run and part, for results.md."""
    summary: dict[str, Any] = {}
    for row in rows:
        scores = summary.setdefault(row["suite"], {}).setdefault(row["run"], {})
        scores[row["part"]] = round(100 * row["score"], 1)
    return summary


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
