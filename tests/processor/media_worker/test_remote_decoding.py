"""Streams of frames from a media worker: bounded, resumed, and ended early."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2vl.errors import InputError
from qwen2vl.processor.media.decoder import LOCAL_DECODER, MediaDecoder
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.media.video_metadata import FramesDifferError
from qwen2vl.processor.media_worker.pool import MediaWorkerPool
from qwen2vl.processor.media_worker.worker_process import WorkerProcess
from tests.media import encoded_video, frames_of, wiped
from tests.processor.media_worker.test_faults import linux, wait_for

LIMITS = MediaLimits()
GOPS = encoded_video(90, options={"g": "12", "bf": "2"})
# Of 921,600 bytes a frame, so that few of them fit into the buffers of a socket.
LARGE = encoded_video(40, width=640, height=480, options={"preset": "ultrafast"})


@pytest.fixture(scope="module")
def pool() -> Iterator[MediaWorkerPool]:
    with MediaWorkerPool(1) as pool:
        yield pool


def open_video(decoder: MediaDecoder, data: bytes, limits: MediaLimits = LIMITS) -> Any:
    return decoder.open_video(data, limits, "video 1", fps=2, apply_exif_orientation=True)


def as_bytes(pixels: np.ndarray) -> bytes:
    return pixels.tobytes()


def local_frames(data: bytes, indices: range) -> list[bytes]:
    frames = frames_of(open_video(LOCAL_DECODER, data), indices, as_bytes)
    assert frames is not None
    return frames


def kill(worker: WorkerProcess) -> None:
    """Kill a worker, whose frames may still be received."""
    with suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGKILL)
    wait_for(lambda: worker._process.poll() is not None)


@pytest.mark.parametrize("step", [1, 7, 40])
def test_frames_are_those_of_this_process(pool: MediaWorkerPool, step: int) -> None:
    """Also a second time, from the same worker."""
    pids, indices = pool.worker_pids, range(0, 90, step)
    with closing(open_video(pool, GOPS)) as reader:
        for _ in range(2):
            assert frames_of(reader, indices, as_bytes) == local_frames(GOPS, indices)
    assert pool.worker_pids == pids


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Give a list to which the indices of each request for frames are added."""
    requests: list[list[int]] = []
    begin_job = WorkerProcess.begin_job

    def record(worker: WorkerProcess, header: Any, payload: Any, seconds: float) -> None:
        if header["job"] == "frames":
            requests.append(payload.tolist())
        begin_job(worker, header, payload, seconds)

    monkeypatch.setattr(WorkerProcess, "begin_job", record)
    return requests


@linux
def test_a_worker_does_not_run_ahead(pool: MediaWorkerPool, requests: list[list[int]]) -> None:
    """It decodes what the buffers of the socket hold, and then waits for the parent."""
    with closing(open_video(pool, LARGE)) as reader:
        frames = reader.frames_at(range(40), as_bytes)
        got = [next(frames)]
        pid = reader._opened_in.pid
        wait_for(lambda: is_waiting(pid) and not time.sleep(0.2) and is_waiting(pid))
        kill(reader._opened_in)
        got += frames
    assert got == local_frames(LARGE, range(40))
    _, second = requests
    assert 2 <= second[0] < 10  # those before were decoded, and are received from the buffers


def is_waiting(pid: int) -> bool:
    """Return whether all threads of a process sleep; none may have ended meanwhile."""
    try:
        states = [
            (task / "stat").read_text().rpartition(")")[2].split()[0]
            for task in Path(f"/proc/{pid}/task").iterdir()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return set(states) == {"S"}


@pytest.mark.parametrize("how", ["generator", "reader", "collected"])
def test_streams_that_end_early(pool: MediaWorkerPool, how: str) -> None:
    """The worker, which may be sending, is replaced; what is decoded next is right."""
    (pid,) = pool.worker_pids
    reader = open_video(pool, LARGE)
    frames = reader.frames_at(range(40), as_bytes)
    next(frames)
    if how == "generator":
        frames.close()
        assert frames_of(reader, [1, 2], as_bytes) == local_frames(LARGE, range(1, 3))
    elif how == "collected":
        del frames
    reader.close()
    if how == "reader":
        with pytest.raises(RuntimeError, match="video 1 is read after its reader was closed"):
            next(frames)
    with closing(open_video(pool, GOPS)) as reader:
        assert frames_of(reader, range(5), as_bytes) == local_frames(GOPS, range(5))
    assert pool.worker_pids != [pid] and len(pool.worker_pids) == 1


def test_a_stream_that_ends_with_its_last_frame_keeps_the_worker(pool: MediaWorkerPool) -> None:
    pids = pool.worker_pids
    with closing(open_video(pool, GOPS)) as reader:
        frames = reader.frames_at([3, 30], as_bytes)
        assert [next(frames), next(frames)] == [local_frames(GOPS, range(90))[i] for i in (3, 30)]
        frames.close()
    assert pool.worker_pids == pids


@pytest.mark.parametrize("data", [GOPS, LARGE], ids=["all frames sent", "while sending"])
def test_a_killed_worker_is_replaced_at_the_next_frame(
    pool: MediaWorkerPool, data: bytes, requests: list[list[int]]
) -> None:
    """Twice; no frame is missing, comes twice, or is asked for again."""
    indices, got = range(0, 40, 2), []
    with closing(open_video(pool, data)) as reader:
        for frame in reader.frames_at(indices, as_bytes):
            got.append(frame)
            if len(got) in (4, 9):
                kill(reader._opened_in)
    assert got == local_frames(data, indices)
    firsts = [request[0] // 2 for request in requests]
    # Frames that were sent before the end are still received.
    assert firsts[0] == 0 and min(firsts[1:], default=4) >= 4 and firsts == sorted(set(firsts))
    assert all(request == list(indices)[-len(request) :] for request in requests)


def test_a_third_kill_is_an_error(pool: MediaWorkerPool) -> None:
    got: list[bytes] = []

    def receive_and_kill(pixels: np.ndarray) -> None:
        got.append(as_bytes(pixels))
        kill(reader._opened_in)

    with closing(open_video(pool, LARGE)) as reader:
        text = "video 1: the process that decodes it was killed 3 times"
        with pytest.raises(InputError, match=text):
            frames_of(reader, range(40), receive_and_kill)
    assert got == local_frames(LARGE, range(len(got)))


def test_differing_frames_in_the_middle(pool: MediaWorkerPool) -> None:
    """Frames before the damage arrive; then the metadata are replaced, and the worker goes on."""
    data = wiped(encoded_video(60, width=320, height=240), 0.5, 400)
    local = open_video(LOCAL_DECODER, data)
    with closing(open_video(pool, data)) as reader:
        worker = reader._opened_in
        assert reader.metadata == local.metadata
        results = []
        for each in (reader, local):
            seen: list[bytes] = []
            with pytest.raises(FramesDifferError):
                seen.extend(each.frames_at(range(60), as_bytes))
            results.append((seen, each.metadata))
        assert results[0] == results[1]
        last = len(reader.metadata.timestamps) - 1
        assert frames_of(reader, [0, last], as_bytes) == frames_of(local, [0, last], as_bytes)
        assert reader._opened_in is worker
    assert pool.worker_pids == [worker.pid]


def test_a_second_worker_finds_the_same_difference(pool: MediaWorkerPool) -> None:
    """The indices were chosen by the metadata of its frames: they are asked for again."""
    data = wiped(encoded_video(60, width=320, height=240), 0.5, 400)
    with closing(open_video(pool, data)) as reader:
        assert frames_of(reader, range(60), as_bytes) is None
        indices = range(len(reader.metadata.timestamps))
        wanted = frames_of(reader, indices, as_bytes)
        kill(reader._opened_in)
        assert frames_of(reader, indices, as_bytes) == wanted


def test_time_limit_counts_decoding_only(
    pool: MediaWorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, later = time.monotonic, [0.0]
    with closing(open_video(pool, LARGE, MediaLimits(decode_timeout=60))) as reader:
        monkeypatch.setattr(time, "monotonic", lambda: clock() + later[0])
        count = 0
        for _ in reader.frames_at(range(40), as_bytes):
            count, later[0] = count + 1, later[0] + 1000
    assert count == 40


@linux
def test_time_limit_of_a_stream(pool: MediaWorkerPool) -> None:
    """A worker that is stopped, as one that hangs, ends when the limit is exceeded."""
    with closing(open_video(pool, LARGE, MediaLimits(decode_timeout=0.5))) as reader:
        reader._lease._remaining = 0.5
        frames = reader.frames_at(range(40), as_bytes)
        next(frames)
        os.kill(reader._opened_in.pid, signal.SIGSTOP)
        with pytest.raises(InputError, match=r"video 1 took more than 0\.5 s to decode"):
            list(frames)
