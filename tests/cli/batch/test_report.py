"""BatchReport and LineCounter: summary, progress and exit code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qwen2vl.cli import terminal
from qwen2vl.cli.batch import report as module
from qwen2vl.cli.batch.report import BatchReport, LineCounter
from qwen2vl.server.batch.runner import Answer, BatchCounts


@pytest.mark.parametrize(
    ("done", "failed", "code", "text"),
    [
        (0, 0, 0, "1 image answered, 0 failed, in 2.0 s (5 output tokens/s): out\n"),
        (0, 1, 1, "1 image answered, 1 failed, in"),
        (1, 0, 1, "1 image answered, 0 failed, 2 already done (1 failed), in"),
        (0, 1, 1, "the error: line 1: no (--retry-failed repeats what failed)\n"),
        (1, 2, 1, "all 3 errors: such as line 0: no (--retry-failed repeats what failed)\n"),
    ],
)
def test_summary_and_exit_code(
    capsys: pytest.CaptureFixture[str], done: int, failed: int, code: int, text: str
) -> None:
    report = BatchReport(Path("out"), "image")
    if done:
        report.count_done({"error": None})
        report.count_done({"error": {"code": "x", "message": "line 0: no"}})
    counts = BatchCounts(answered=1, output_tokens=10)
    for number in range(failed):
        counts.errors.add(f"line {number + 1}: no")
    assert report.finish(counts, 2.0) == code
    assert text in capsys.readouterr().err


def test_an_empty_error_of_a_csv_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    report = BatchReport(Path("out"), "image")
    report.count_done({"error": ""})
    assert report.finish(BatchCounts()) == 0
    summary = "qwen2vl: 0 images answered, 0 failed, 1 already done: out\n"
    assert capsys.readouterr().err == summary


def test_a_run_without_output_has_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    counts = BatchCounts()
    counts.errors.add("x" * 10_000)
    BatchReport(Path("out"), "image").finish(counts, 2.0)
    summary, error, _ = capsys.readouterr().err.split("\n")
    assert summary == "qwen2vl: 0 images answered, 1 failed, in 2.0 s: out"
    assert len(error) < 600


def test_progress_counts_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, int, int]] = []

    @contextmanager
    def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
        yield lambda *values: shown.append(values)

    monkeypatch.setattr(terminal, "progress_bar", progress_bar)
    monkeypatch.setattr(module, "SECONDS_PER_UPDATE", 0.0)
    report = BatchReport(Path("out"), "request")
    report.count_done({"error": None})
    counts = BatchCounts()

    async def work(on_answer: Callable[[BatchCounts], None]) -> None:
        for is_failed in (False, True):
            counts.add(Answer(row=b"", error="no" if is_failed else None))
            on_answer(counts)

    assert report.run(work, counts, lambda: 2) == 1
    assert shown == [("answering", 2, 2), ("1 failed", 3, 3)]


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def work(_: Callable[[BatchCounts], None]) -> None:
        raise KeyboardInterrupt

    assert BatchReport(Path("out"), "request").run(work, BatchCounts(), lambda: 2) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "count"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\nb", 2)])
def test_lines_are_counted(tmp_path: Path, content: bytes, count: int) -> None:
    (tmp_path / "in").write_bytes(content)
    counter = LineCounter(tmp_path / "in")
    deadline = time.monotonic() + 10
    while counter.count != count and time.monotonic() < deadline:
        time.sleep(0.001)
    assert counter.count == count
