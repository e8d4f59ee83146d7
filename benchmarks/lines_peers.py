"""OCR programs and a model on the same lines of text. python benchmarks/lines_peers.py

    qwen2vl fetch-data test-fonts rapidocr; pip install onnxruntime; apt-get install tesseract-ocr
    qwen2vl eval --suite lines -o nano.jsonl
    python benchmarks/lines_peers.py --results nano.jsonl

Prints a table by part with the character error rate and its 95 % interval, of a peer at its better
scale (harness/ocr_peers.py, where the packages of Tesseract's other models are listed too), and one
line for results.md. Peers that are not installed are left out. Also for `--suite synthetic --task
"text*"` and `--suite any-size --task "line_*"`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.ocr_peers import OcrPeer, better_scale, find_ocr_peers
from record import format_result

from qwen2vl.errors import InputError
from qwen2vl.eval.runner.results_file import ResultsFile, read_results
from qwen2vl.eval.runner.run import run_items
from qwen2vl.eval.suites.registry import open_suite, select_suite_parts
from qwen2vl.eval.suites.suite import Suite
from qwen2vl.eval.task import ExampleResult, TaskResults

Cell = dict[str, Any]  # of the table: character_errors, interval, exact, scale


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", default="lines")
    parser.add_argument("--task", action="append", help='parts, such as "latin*"; default: all')
    parser.add_argument("--limit", type=int, help="only the first LIMIT lines of each part")
    parser.add_argument(
        "--results", type=Path, help="results file of a model, by `qwen2vl eval -o`"
    )
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    suite = open_suite(args.suite)
    parts = select_suite_parts(suite, args.task or ())
    peers, absent = find_ocr_peers(parts)
    print(*absent, sep="\n", file=sys.stderr)
    table: dict[str, dict[str, Cell]] = {}
    model = _read_model(suite, args.results) if args.results else {}
    for part in parts:
        ids = {item.id for item in suite.items([part])[: args.limit]}
        own = [peer for peer in peers if part in peer.parts]
        table[part] = _best_of_peers(suite, part, own, args.limit)
        for name, results in model.items():
            if answered := [result for result in results if result.name in ids]:
                table[part][name] = _cell(part, answered)
    print(format_table(table))
    print(format_result({"suite": suite.name, "digest": suite.digest, "parts": table}))


def _best_of_peers(
    suite: Suite, part: str, peers: Sequence[OcrPeer], limit: int | None
) -> dict[str, Cell]:
    """Run the peers of a part, and return each program's scores at its better scale."""
    runs: dict[str, dict[int, list[ExampleResult]]] = defaultdict(dict)
    for peer in peers:
        results = ResultsFile()
        run_items(suite, suite.items([part])[:limit], peer.open_answerer(part), results)
        runs[peer.program][peer.scale] = list(results.results.values())
        print(f"{part} {peer.name}", file=sys.stderr)
    cells: dict[str, Cell] = {}
    for program, by_scale in runs.items():
        scale = better_scale(by_scale)
        cells[program] = {"scale": scale, **_cell(part, by_scale[scale])}
    return cells


def _read_model(suite: Suite, path: Path) -> dict[str, list[ExampleResult]]:
    """Read the results of a model by its name.

    Raises:
        InputError: they are of another suite, or of the blind control.
    """
    header, results = read_results(path)
    if header.digest != suite.digest or header.blind:
        raise InputError(
            f"{path}: has results of {header.suite}, blind {header.blind}, digest "
            f"{header.digest[:8]}; it must be {suite.name} with pictures, {suite.digest[:8]}"
        )
    return {str(header.model["name"]): list(results.values())}


def _cell(part: str, results: Sequence[ExampleResult]) -> Cell:
    scored = TaskResults(task=part, note="", results=tuple(results))
    return {
        "character_errors": scored.character_error_rate,
        "interval": scored.character_error_interval,
        "exact": scored.accuracy,
        "lines": scored.num_examples,
    }


def format_table(table: Mapping[str, Mapping[str, Cell]]) -> str:
    """Write the rows of a Markdown table, in percent."""
    columns = list(dict.fromkeys(name for cells in table.values() for name in cells))
    rows = [["part", *columns], ["---", *["--:"] * len(columns)]]
    rows += [
        [part, *(_format_cell(cells[name]) if name in cells else "" for name in columns)]
        for part, cells in table.items()
        if cells
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _format_cell(cell: Cell) -> str:
    low, high = cell["interval"]
    scale = f" at {cell['scale']}x" if "scale" in cell else ""
    return f"{100 * cell['character_errors']:.1f} ({100 * low:.1f} - {100 * high:.1f}){scale}"


if __name__ == "__main__":
    main()
