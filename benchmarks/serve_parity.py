"""Answers of the server under concurrent mixed clients beside those of `LLM`: equal token by token?

    python benchmarks/serve_parity.py [--requests 320] [--concurrency 32]

Text, pictures, frames of a video, raw completions; streamed and not; greedy and sampled with a
seed, penalties, stop strings, two samples. `LLM` answers them one by one, in float32 like the
server. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from record import ROOT, format_result
from serve.parity import differences, llm_answer, mixed_bodies, server_answers
from serve.processes import ServerProcess, free_port, qwen2vl_command

from qwen2vl.engine import LLM


def main() -> None:
    """Compare and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=320)
    parser.add_argument("--concurrency", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    requests = mixed_bodies(given.requests)
    llm = LLM("nano", dtype="float32", device="cpu")
    expected = [llm_answer(llm, request) for request in requests]
    port = free_port()
    command = qwen2vl_command(port, "--dtype", "float32", "--device", "cpu")
    with (
        TemporaryDirectory() as folder,
        ServerProcess(command, port, log=Path(folder, "log"), cwd=ROOT),
    ):
        found = asyncio.run(server_answers(port, requests, given.concurrency))
    different = 0
    for number, (mine, other) in enumerate(zip(found, expected, strict=True)):
        if text := differences(mine, other):
            different += 1
            print(f"request {number}, {requests[number].path}: {text}", file=sys.stderr)
    numbers = {
        "requests": given.requests,
        "concurrency": given.concurrency,
        "tokens": sum(len(one.tokens) for answers in expected for one in answers),
        "different": different,
    }
    print(format_result(numbers))


if __name__ == "__main__":
    main()
