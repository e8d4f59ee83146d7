"""lmms-eval on the mini suite, through our server and in its own process: equal item by item?

    python benchmarks/harness_install.py lmms-eval ENVIRONMENT
    python benchmarks/lmms_eval_parity.py ENVIRONMENT [--limit N] [--keep FOLDER]

The suite is exported as a task folder, then run three times with nano in float32: by lmms-eval's
client for OpenAI's API against `qwen2vl serve`, by lmms-eval with our model class, and here by
`LLM` without lmms-eval, on the arrays that were exported. Counts equal texts, usage and scores,
answers of failed requests, and answers without usage. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness.samples import Comparison, Sample, compare, read_samples
from harness.suite import OPTIONS, serve_options, suite_answers
from harness_install import HARNESSES
from lmms_eval_export import DEFAULT_PARTS, GROUP, export, task_name
from record import ROOT, format_result
from serve.processes import ServerProcess, free_port, qwen2vl_command

FRAMES = 8  # of the longest clip; shorter ones have all of theirs


def main() -> None:
    """Run, compare and print the result."""
    given = _arguments()
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        exported = export(folder / "tasks", given.part or DEFAULT_PARTS, given.limit)
        names = {part: task_name(part) for part in exported}
        runs = {
            "server": _run_server(given, folder, names),
            "in_process": _run_in_process(given, folder, names),
        }
    print("LLM on the suite", file=sys.stderr)
    suite = suite_answers(exported, given.limit)
    tasks = {part: compare(runs["server"][part], runs["in_process"][part]) for part in exported}
    for part, found in tasks.items():
        if found.different:
            print(f"{part}: different: {found.different}", file=sys.stderr)
    same = {part: _equal_texts(suite[part], runs["in_process"][part]) for part in exported}
    numbers = {
        "harness": HARNESSES["lmms-eval"].requirement,
        "total": _total(tasks) | {"equal_to_llm": sum(same.values())},
        "parts": {
            part: _without_ids(found)
            | {"equal_to_llm": same[part], "accuracy": _accuracy(runs["server"][part])}
            for part, found in tasks.items()
        },
    }
    print(format_result(numbers))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("environment", type=Path, help="folder of harness_install.py")
    parser.add_argument("--part", action="append", help="of the suite; repeatable")
    parser.add_argument("--limit", type=int, help="questions of a part")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--port", type=int, default=0, help="of the server; 0: a free one")
    parser.add_argument("--keep", type=Path, help="write task folder, logs and samples here")
    return parser.parse_args()


def _run_server(
    given: argparse.Namespace, folder: Path, names: Mapping[str, str]
) -> dict[str, dict[int, Sample]]:
    """Run lmms-eval's client against a server of nano."""
    port = given.port or free_port()
    model_args = {
        "model": "nano",
        "base_url": f"http://127.0.0.1:{port}/v1",
        "api_key": "none",
        "num_concurrent": given.concurrency,
        "max_retries": 1,  # a failure is counted, not hidden
        "max_frames_num": FRAMES,
        "pass_video_url": True,
    }
    command = qwen2vl_command(port, *serve_options(OPTIONS, folder / "tasks"))
    with ServerProcess(command, port, log=folder / "server.log", cwd=ROOT) as server:
        samples = _lmms_eval(given, folder, names, "openai", model_args)
        if server.process is None or server.process.poll() is not None:
            raise SystemExit(f"port {port}: our server has ended; another program answered")
        return samples


def _run_in_process(
    given: argparse.Namespace, folder: Path, names: Mapping[str, str]
) -> dict[str, dict[int, Sample]]:
    """Run lmms-eval with our model class."""
    model_args = {"pretrained": "nano", **OPTIONS, "max_num_frames": FRAMES}
    return _lmms_eval(given, folder, names, "qwen2vl", model_args)


def _lmms_eval(
    given: argparse.Namespace,
    folder: Path,
    names: Mapping[str, str],
    model: str,
    model_args: Mapping[str, Any],
) -> dict[str, dict[int, Sample]]:
    """Run lmms-eval with one model on the exported tasks; return its samples."""
    output = folder / model
    command = [
        str(given.environment.resolve() / "bin" / "python"),
        "-m",
        "lmms_eval",
        "--model",
        model,
    ]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in model_args.items())]
    command += ["--batch_size", str(given.batch_size), "--include_path", str(folder / "tasks")]
    command += ["--tasks", GROUP, "--log_samples", "--output_path", str(output)]
    print("+", *command, file=sys.stderr)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    variables = {**os.environ, **offline, "HF_HOME": str(folder / "huggingface")}
    log = folder / f"{model}.log"
    with log.open("wb") as out:  # elsewhere: the checkout's metadata may be older than its install
        subprocess.run(command, env=variables, cwd=folder, stdout=out, stderr=out)
    try:  # its exit status is 0 after an error, too
        return read_samples(output, names)
    except FileNotFoundError as error:
        raise SystemExit(f"{error}; its log ends with: {log.read_text()[-2000:]}") from error


def _equal_texts(texts: Sequence[str], samples: Mapping[int, Sample]) -> int:
    return sum(text == samples[i].text for i, text in enumerate(texts) if i in samples)


def _accuracy(samples: Mapping[int, Sample]) -> float:
    return round(100 * sum(one.accuracy for one in samples.values()) / len(samples), 1)


def _without_ids(found: Comparison) -> dict[str, int]:
    return {name: value for name, value in asdict(found).items() if name != "different"}


def _total(tasks: Mapping[str, Comparison]) -> dict[str, int]:
    parts = [_without_ids(found) for found in tasks.values()]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


if __name__ == "__main__":
    main()
