"""Peers on the single icons of the suite named-pictures. python benchmarks/named_pictures_peers.py

    qwen2vl fetch-data named-pictures efficientnet-lite0

Prints a table: accuracy by part with its 95 % interval, of EfficientNet-Lite0's features and of
pixels (harness/picture_peers.py), and one line for results.md. The network sees 224 x 224 pixels,
as it was trained; with --side 112 it is weaker and four times as fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from harness.efficientnet import SIDE
from harness.picture_peers import PARTS, build_peers
from record import format_result

from qwen2vl.eval.runner.results_file import ResultsFile
from qwen2vl.eval.runner.run import run_items
from qwen2vl.eval.suites.registry import open_suite
from qwen2vl.eval.task import TaskResults

Table = Mapping[str, Mapping[str, TaskResults]]  # part -> peer -> results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, help="only the first LIMIT items of each part")
    parser.add_argument("--side", type=int, default=SIDE, help="pixels of the network's input")
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = open_suite("named-pictures")
    peers = build_peers(args.side)
    table: dict[str, dict[str, TaskResults]] = {part: {} for part in PARTS}
    for part in PARTS:
        items = suite.items([part])[: args.limit]
        for name, peer in peers.items():
            results = ResultsFile()
            run_items(suite, items, peer, results)
            answered = tuple(results.results[item.id] for item in items)
            table[part][name] = TaskResults(task=part, note=suite.note(part), results=answered)
    print(format_table(table))
    scores = {
        part: {name: round(100 * results.accuracy, 1) for name, results in row.items()}
        for part, row in table.items()
    }
    print(format_result({"suite": suite.name, "digest": suite.digest, "parts": scores}))


def format_table(table: Table) -> str:
    """Return the accuracies in percent, a part a line."""
    peers = list(next(iter(table.values())))
    lines = [f"{'part':20}{'items':>6}" + "".join(f"{peer:>26}" for peer in peers)]
    for part, row in table.items():
        cells = [_format_cell(results) for results in row.values()]
        count = next(iter(row.values())).num_examples
        lines.append(f"{part:20}{count:6}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def _format_cell(results: TaskResults) -> str:
    low, high = results.accuracy_interval
    return f"{100 * results.accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    main()
