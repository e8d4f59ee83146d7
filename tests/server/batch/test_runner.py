"""run_jobs: how many jobs run at a time, what is written, and an engine that dies."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qwen2vl.engine import AsyncLLM
from qwen2vl.errors import EngineError, InputError
from qwen2vl.files.record_file import RecordFile, to_json_line
from qwen2vl.server.batch import runner
from qwen2vl.server.batch.runner import (
    MAX_ATTEMPTS,
    Answer,
    BatchCounts,
    ErrorCounts,
    run_jobs,
)


class FakeEngine:
    """Is restarted as an AsyncLLM is."""

    def __init__(self) -> None:
        self.llm = SimpleNamespace(engine_config=SimpleNamespace(max_num_seqs=2))
        self.is_alive = True
        self.num_restarts = 0

    def restart(self) -> None:
        self.is_alive = True
        self.num_restarts += 1


class FakeHandler:
    """Answers a number by itself; `kills` kill the engine, with all that run."""

    def __init__(self, engine: FakeEngine, kills: tuple[int, ...] = ()) -> None:
        self.engine = engine
        self.kills = kills
        self.running: set[int] = set()
        self.max_running = 0
        self.calls: list[int] = []

    async def answer(self, job: int) -> Answer:
        self.calls.append(job)
        self.running.add(job)
        self.max_running = max(self.max_running, len(self.running))
        number = self.engine.num_restarts
        is_repeat = self.calls.count(job) > 1
        try:
            if job in self.kills:
                self.engine.is_alive = False
            for _ in range(3):
                assert not is_repeat or self.running == {job}, "nothing runs beside a repeat"
                await asyncio.sleep(0)
                if not self.engine.is_alive or number != self.engine.num_restarts:
                    raise EngineError("died")
        finally:
            self.running.remove(job)
        return Answer(row=to_json_line({"id": job}))

    def failure(self, job: int, error: EngineError) -> Answer:
        return Answer(row=to_json_line({"id": job, "error": str(error)}), error=str(error))


def run(
    path: Path,
    jobs: Iterator[int],
    handler: Any,
    on_answer: Callable[[BatchCounts], None] = lambda counts: None,
) -> BatchCounts:
    counts = BatchCounts()
    engine = cast(AsyncLLM, handler.engine)
    with RecordFile(path, row_start=b'{"id"') as file:
        asyncio.run(run_jobs(jobs, handler, file, engine, counts, on_answer=on_answer))
    return counts


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_text().splitlines()]


def test_twice_as_many_jobs_as_the_engine_runs_are_in_flight(tmp_path: Path) -> None:
    handler = FakeHandler(FakeEngine())
    num_read = 0

    def jobs() -> Iterator[int]:
        nonlocal num_read
        while num_read < 100:
            num_read += 1
            yield num_read

    def check(counts: BatchCounts) -> None:
        assert num_read <= counts.answered + 4, "the jobs are read lazily"

    counts = run(tmp_path / "out", jobs(), handler, check)
    assert handler.max_running == 4
    assert (counts.answered, counts.failed) == (100, 0)
    assert sorted(one["id"] for one in records(tmp_path / "out")) == list(range(1, 101))


def test_an_engine_that_dies_is_restarted_and_its_jobs_run_again(tmp_path: Path) -> None:
    engine = FakeEngine()
    handler = FakeHandler(engine, kills=(13, 57))
    counts = run(tmp_path / "out", iter(range(100)), handler)
    found = {one["id"]: one for one in records(tmp_path / "out")}
    assert len(found) == len(records(tmp_path / "out")) == 100
    assert {one for one in found if "error" in found[one]} == {13, 57}
    assert (counts.answered, counts.failed) == (98, 2)
    assert handler.calls.count(13) == MAX_ATTEMPTS
    assert engine.is_alive
    assert engine.num_restarts == 2 * MAX_ATTEMPTS


def test_an_engine_that_cannot_be_restarted_ends_the_run(tmp_path: Path) -> None:
    engine = FakeEngine()

    def restart() -> None:
        raise EngineError("cannot")

    engine.restart = restart
    with pytest.raises(EngineError, match="cannot"):
        run(tmp_path / "out", iter(range(100)), FakeHandler(engine, kills=(13,)))
    assert all("error" not in one for one in records(tmp_path / "out"))


def test_an_error_of_the_jobs_ends_the_run(tmp_path: Path) -> None:
    def jobs() -> Iterator[int]:
        yield 1
        raise InputError("changed")

    with pytest.raises(InputError, match="changed"):
        run(tmp_path / "out", jobs(), FakeHandler(FakeEngine()))


def test_what_was_written_is_forced_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SYNC_SECONDS", 0.001)
    sizes: list[int] = []
    is_synced = threading.Event()

    def sync(file: RecordFile) -> None:
        sizes.append(file.path.stat().st_size)
        is_synced.set()

    monkeypatch.setattr(RecordFile, "sync", sync)
    handler = FakeHandler(FakeEngine())

    async def answer(job: int) -> Answer:
        if job == 2:
            is_synced.clear()  # after that, the timer of the run
            assert await asyncio.to_thread(is_synced.wait, 60)
        return Answer(row=to_json_line({"id": job}))

    handler.answer = answer
    run(tmp_path / "out", iter(range(3)), handler)
    size = (tmp_path / "out").stat().st_size
    assert sizes[0] < size
    assert sizes[-2:] == [size, size]  # at the end of the run, and of the file


def test_a_disk_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SYNC_SECONDS", 0.001)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    handler = FakeHandler(FakeEngine())

    async def answer(job: int) -> Answer:
        monkeypatch.setattr(os, "fsync", fail)
        await asyncio.sleep(60 if job == 3 else 0)
        return Answer(row=to_json_line({"id": job}))

    handler.answer = answer
    for count in (3, 4):  # at the end, and while a job runs
        with pytest.raises(InputError, match="cannot be written: Input/output error"):
            run(tmp_path / str(count), iter(range(count)), handler)
        assert [one["id"] for one in records(tmp_path / str(count))] == [0, 1, 2]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], ""),
        (["no"], "the error: no"),
        (["no", "no"], "all 2 errors: no"),
        (["x", "model 'a' is unknown", "model 'b' is unknown"], "2 of 3 errors: such as model 'a'"),
        (["line 1 is not JSON", "line 22 is not JSON", "x"], "2 of 3 errors: such as line 1 is"),
        (["b", "a.png is text/plain", "sub/c.png is text/plain"], "2 of 3 errors: such as a.png"),
    ],
)
def test_the_commonest_kind_of_error(texts: list[str], expected: str) -> None:
    counts, later, both = ErrorCounts(), ErrorCounts(), ErrorCounts()
    for number, text in enumerate(texts):
        (later if number else counts).add(text)
    both.add_all(counts)
    both.add_all(later)
    assert both.total == len(texts)
    assert both.describe_commonest().startswith(expected) and (texts or not expected)


def test_kinds_of_errors_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_KINDS", 2)
    counts = ErrorCounts()
    for text in ("a", "b", "c", "c", "b"):
        counts.add(text)
    assert counts.describe_commonest() == "2 of 5 errors: b"
