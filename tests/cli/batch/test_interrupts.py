"""Batches that are killed at any moment, or interrupted by Ctrl-C, are continued."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.batch.requests import chat, contents, questions, records, write_requests


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a batch, which does not outlive the test."""
    command = [sys.executable, "-m", "qwen2vl", "batch", *arguments, "--dtype", "float32"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_size(process: subprocess.Popen[bytes], path: Path, size: int) -> None:
    """Wait until the output of a batch is larger than a size, or the batch has ended."""
    deadline = time.monotonic() + 60
    while process.poll() is None and not (path.exists() and path.stat().st_size > size):
        assert time.monotonic() < deadline, "the batch writes nothing"
        time.sleep(0.001)


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_every_line_is_answered_once_after_kill_9(tmp_path: Path, num_kills: int) -> None:
    texts = questions(25 * num_kills)
    write_requests(tmp_path / "in.jsonl", texts)
    output = tmp_path / "out.jsonl"
    rng = random.Random(num_kills)
    num_interrupted = 0
    for _ in range(num_kills):
        before = output.read_bytes() if output.exists() else b""
        with started(tmp_path, "in.jsonl", "-o", "out.jsonl") as process:
            wait_for_size(process, output, len(before))
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        num_interrupted += process.returncode == -signal.SIGKILL
        assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert num_interrupted >= max(1, num_kills // 2)
    assert output.read_bytes().count(b"\n") < len(texts), "the last kill left something to do"
    with started(tmp_path, "in.jsonl", "-o", "out.jsonl") as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert contents(output) == chat(texts)


def test_ctrl_c_keeps_what_is_written(tmp_path: Path) -> None:
    texts = questions(2000)
    write_requests(tmp_path / "in.jsonl", texts)
    output = tmp_path / "out.jsonl"
    with started(tmp_path, "in.jsonl", "-o", "out.jsonl") as process:
        wait_for_size(process, output, 0)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode().endswith("qwen2vl: interrupted; the same command continues\n")
    assert 0 < len(records(output)) < 2000
    assert re.search(rf"{len(records(output)):,} requests? answered, 0 failed", error.decode())
