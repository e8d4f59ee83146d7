"""VLMEvalKit on the mini suite, through our server: the answers of `LLM` item by item?

    python benchmarks/harness_install.py vlmeval ENVIRONMENT
    python benchmarks/vlmeval_parity.py ENVIRONMENT [--limit N] [--keep FOLDER]

The parts with pictures are written as TSV files with the paths of PNG files, and asked by the kit's
client for servers (`--base-url`, `--local-media`), with nano in float32. The answers are compared
with those of `LLM` on the arrays that were exported. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import torch
from harness.suite import GREEDY, MAX_TOKENS, OPTIONS, serve_options, suite_answers
from harness_install import HARNESSES
from lmms_eval_export import DEFAULT_PARTS, export
from record import ROOT, format_result
from serve.processes import ServerProcess, free_port, qwen2vl_command

RUN_MODULE = Path(__file__).resolve().parent / "harness" / "run_module.py"
FAILED = "Failed to obtain answer via API"  # begins the kit's answer to a request that failed
PARTS = tuple(part for part in DEFAULT_PARTS if part != "motion")  # a TSV holds pictures only

# Writes the answers of the kit's table as lines "INDEX<tab>repr(ANSWER)"; it has pandas.
READ_TABLE = """
import sys, pandas
table = pandas.read_excel(sys.argv[1], dtype=str, keep_default_na=False)
for index, answer in zip(table["index"], table["prediction"]):
    print(index, repr(answer), sep="\\t")
"""


def main() -> None:
    """Run, compare and print the result."""
    given = _arguments()
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        exported = export(folder / "tasks", given.part or PARTS, given.limit)
        for part in exported:
            _write_tsv(folder, part)
        found = _run(given, folder, list(exported))
    suite = suite_answers(exported, given.limit)
    parts = {
        part: {
            "items": len(suite[part]),
            "equal_to_llm": sum(
                found[part].get(i) == answer for i, answer in enumerate(suite[part])
            ),
            "failed": sum(answer.startswith(FAILED) for answer in found[part].values()),
        }
        for part in exported
    }
    total = {name: sum(part[name] for part in parts.values()) for name in parts[next(iter(parts))]}
    harness = HARNESSES["vlmeval"].requirement
    print(format_result({"harness": harness, "total": total, "parts": parts}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("environment", type=Path, help="folder of harness_install.py")
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable")
    parser.add_argument("--limit", type=int, help="questions of a part")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--port", type=int, default=0, help="of the server; 0: a free one")
    parser.add_argument("--keep", type=Path, help="write TSV files, logs and answers here")
    return parser.parse_args()


def _write_tsv(folder: Path, part: str) -> None:
    rows = pq.read_table(folder / "tasks" / f"{part}.parquet").to_pylist()
    with (folder / f"{part}.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, dialect="excel-tab")
        writer.writerow(["index", "question", "answer", "image_path"])
        for index, row in enumerate(rows):
            paths = [str(folder / "tasks" / name) for name in row["images"]]
            shown = paths[0] if len(paths) == 1 else repr(paths)
            writer.writerow([index, row["question"], row["answer"], shown])


def _run(
    given: argparse.Namespace, folder: Path, parts: Sequence[str]
) -> dict[str, dict[int, str]]:
    """Run the kit against a server of nano; return part -> index -> answer."""
    port = given.port or free_port()
    python = str(given.environment.resolve() / "bin" / "python")
    command = [python, str(RUN_MODULE), "vlmeval.run", "--data", *parts, "--model", "nano"]
    command += ["--base-url", f"http://127.0.0.1:{port}/v1", "--key", "none", "--local-media"]
    command += ["--mode", "infer", "--max-tokens", str(MAX_TOKENS), "--retry", "1"]
    command += ["--temperature", str(GREEDY), "--api-nproc", str(given.concurrency)]
    command += ["--work-dir", str(folder / "answers")]
    print("+", *command, file=sys.stderr)
    variables = {**os.environ, "LMUData": str(folder), "OMP_NUM_THREADS": "1"}
    server = qwen2vl_command(port, *serve_options(OPTIONS, folder / "tasks"))
    with (
        ServerProcess(server, port, log=folder / "server.log", cwd=ROOT),
        (folder / "vlmeval.log").open("wb") as out,
    ):
        subprocess.run(command, env=variables, cwd=folder, stdout=out, stderr=out, check=True)
    return {part: _read_answers(python, folder, part) for part in parts}


def _read_answers(python: str, folder: Path, part: str) -> dict[int, str]:
    table = folder / "answers" / "nano" / f"nano_{part}.xlsx"
    command = [python, "-c", READ_TABLE, str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pairs = (line.split("\t", 1) for line in done.stdout.splitlines())
    return {int(index): literal_eval(answer) for index, answer in pairs}


if __name__ == "__main__":
    main()
