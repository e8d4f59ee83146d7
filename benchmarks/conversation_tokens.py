"""Tokens of nano's training conversations, with its BPE and with bytes, by task family.

    python benchmarks/conversation_tokens.py [--count 400] [--merges 0 600 1500]

Conversations are those of the stage `world`. Prints a table, and a line for results.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import process_time

from record import format_result

from qwen2vl.processor.processor import Processor
from qwen2vl.recipes import nano
from qwen2vl.synth import render, sample
from qwen2vl.train.init import fresh_processor

SEED = 7


def processors(merges: list[int], folder: Path) -> dict[str, Processor]:
    """Return a processor for each number of merges, by its name in the table."""
    text = replace(nano.MODEL.text, vocab_size=100_000)  # no limit here
    model, config = replace(nano.MODEL, text=text), nano.recipe()
    return {
        f"{number} merges" if number else "bytes": fresh_processor(
            replace(config, num_merges=number), model, folder / str(number)
        )
        for number in merges
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="conversations")
    parser.add_argument("--merges", type=int, nargs="+", default=[0, 600], help="0: bytes")
    args = parser.parse_args()
    columns: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        prepared = processors(args.merges, Path(folder))
    for index in range(args.count):
        start = process_time()
        example = render(sample(SEED, index, nano.WORLD))
        seconds += process_time() - start
        row = columns[example.spec.family]
        row["questions"].append(len(example.truth))
        for name, processor in prepared.items():
            prompt = processor(example.messages, for_training=True)
            vision = sum(item.num_tokens for item in prompt.items)
            row[name].append(len(prompt.input_ids) - vision)
        row["vision"].append(vision)
    names = ["questions", "vision", *prepared]
    for family, row in sorted(columns.items()):
        cells = "  ".join(f"{name} {mean(row[name]):.1f}" for name in names)
        print(f"{family:14s} {len(row['vision']):4d}  {cells}")
    totals = {
        name: round(mean(value for row in columns.values() for value in row[name]), 1)
        for name in names
    }
    print(format_result({**totals, "milliseconds": round(1000 * seconds / args.count, 1)}))


if __name__ == "__main__":
    main()
