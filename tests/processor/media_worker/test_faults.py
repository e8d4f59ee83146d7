"""Media workers that are killed, crash, hang, lie or need too much: the pool goes on."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2vl.errors import (
    ConfigError,
    EngineError,
    InputError,
    MediaWorkerError,
    MediaWorkersBusyError,
)
from qwen2vl.processor.media.decoder import LOCAL_DECODER
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.media_worker import remote_decoding, worker_process
from qwen2vl.processor.media_worker.pool import MediaWorkerPool
from qwen2vl.processor.media_worker.protocol import ChannelClosedError
from qwen2vl.processor.media_worker.worker_process import WorkerLimits
from tests.media import encoded, encoded_video, frames_of, png_header, smooth
from tests.processor.test_bad_images import real_bomb

LIMITS = MediaLimits(max_image_pixels=100_000_000)
SERVER_LIMITS = MediaLimits(max_image_pixels=50_000_000)
JPEG = encoded(smooth(60, 80), "JPEG")
WANTED = LOCAL_DECODER.open_image(JPEG, LIMITS, "x", apply_exif_orientation=True).image.tobytes()

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# A worker that takes jobs, and then does something else.
OTHER_MAIN = """
import json, os, signal, socket, sys, time
settings = json.loads(sys.argv[2]); sys.path += settings['path']
from qwen2vl.processor.media_worker.protocol import Channel
channel = Channel(socket.socket(fileno=int(sys.argv[1])))
channel.send({'ready': True, 'confinement': []})
while True:
    header, size = channel.receive()
    channel.receive_bytes(size)
    %s
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[MediaWorkerPool]:
    with MediaWorkerPool(2) as pool:
        yield pool


@pytest.fixture
def behaving(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes the next workers run other code for each job."""
    monkeypatch.setattr(remote_decoding, "_GRACE_SECONDS", 0.0)
    return lambda code: monkeypatch.setattr(worker_process, "_MAIN", OTHER_MAIN % code)


def decode(pool: MediaWorkerPool, data: Any = JPEG, limits: MediaLimits = LIMITS) -> bytes:
    return pool.open_image(data, limits, "image 1").image.tobytes()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# Killed -----------------------------------------------------------------------------------------


@linux
def test_killed_workers_under_load(pool: MediaWorkerPool) -> None:
    """kill -9 of every worker, ten times, while threads decode: all answers are right."""
    decode(pool)
    done, stop, failures = [0], threading.Event(), []

    def load() -> None:
        while not stop.is_set():
            try:
                assert decode(pool) == WANTED
                done[0] += 1
            except InputError as error:  # all of its workers were killed
                if "killed 3 times" not in str(error):
                    failures.append(error)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            before = done[0]
            for pid in pool.worker_pids:
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda before=before: done[0] > before + 3 or bool(failures))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    wait_for(lambda: len(pool.worker_pids) == 2)


@linux
def test_nothing_leaks(pool: MediaWorkerPool) -> None:
    decode(pool)
    wait_for(lambda: len(pool.worker_pids) == 2)
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(4):
        old = set(pool.worker_pids)
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        assert decode(pool) == WANTED
        wait_for(lambda old=old: len(set(pool.worker_pids) - old) == 2)
        pool.wait_until_ready()
        assert not any(is_running(pid) for pid in old)
        assert not any(Path(f"/proc/{pid}").exists() for pid in old)  # no zombies either
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    assert threading.active_count() == threads


def test_idle_workers_are_replaced(pool: MediaWorkerPool) -> None:
    old = set(pool.worker_pids)
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(pool.worker_pids) == 2 and not old & set(pool.worker_pids))


def test_a_video_goes_on_in_another_worker(pool: MediaWorkerPool) -> None:
    data = encoded_video(40, width=160, height=120)
    wanted = LOCAL_DECODER.open_video(data, LIMITS, "v", fps=2, apply_exif_orientation=True)
    killed: list[int] = []

    def transform(frame: np.ndarray) -> bytes:
        if len(killed) < 1 and reader._opened_in is not None:
            killed.append(reader._opened_in.pid)
            os.kill(killed[0], signal.SIGKILL)
            wait_for(lambda: reader._opened_in._process.poll() is not None)  # pyright: ignore
        return frame.tobytes()

    reader: Any = pool.open_video(data, LIMITS, "v", fps=2, apply_exif_orientation=True)
    with closing(reader):
        indices = [0, 10, 20, 39]
        got = frames_of(reader, indices, transform)
    assert got == frames_of(wanted, indices, lambda frame: frame.tobytes()) and killed
    assert decode(pool) == WANTED


def test_a_job_is_tried_in_three_workers(behaving: Callable[[str], None]) -> None:
    behaving("os.kill(os.getpid(), signal.SIGKILL)")
    with MediaWorkerPool(1) as pool, pytest.raises(InputError, match=r"image 1: .* killed 3 times"):
        decode(pool)


@linux
def test_a_job_survives_two_killed_workers(pool: MediaWorkerPool) -> None:
    lease = remote_decoding.WorkerLease(pool._supervisor, "image 1", 10.0)
    used: list[int] = []

    def call(worker: worker_process.WorkerProcess) -> int:
        used.append(worker.pid)
        if len(used) < 3:
            os.kill(worker.pid, signal.SIGKILL)
            raise ChannelClosedError
        return worker.pid

    assert lease.run(call) == used[-1]
    lease.close()
    assert len(set(used)) == 3


@linux
@pytest.mark.parametrize("is_stopped", [False, True], ids=["idle", "stopped"])
def test_workers_end_with_their_parent(is_stopped: bool) -> None:
    """After kill -9 of the parent; also a worker that could not notice that its socket closed."""
    code = (
        "import time; from qwen2vl.processor.media_worker.pool import MediaWorkerPool; "
        "pool = MediaWorkerPool(1); pool.start(); pool.wait_until_ready(); "
        "print(*pool.worker_pids, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        (pid,) = map(int, parent.stdout.readline().split())
        assert is_running(pid)
        if is_stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    wait_for(lambda: not is_running(pid))


# Crashes, limits, lies ----------------------------------------------------------------------------

LYING = {
    "text instead of a header": "channel._socket.sendall(b'HTTP/1.1 400 Bad Request' + bytes(99))",
    "a long header": "channel._socket.sendall(b'\\xff' * 12)",
    "not an object": "channel.send([])",
    "nothing": "channel.send({})",
    "no size": "channel.send({'height': -1, 'width': 5, 'notes': [], 'orientation': 1})",
    "too large": "channel.send({'height': 10**6, 'width': 10**6, 'notes': [], 'orientation': 1})",
    "too few bytes": "channel.send({'height': 8, 'width': 8, 'notes': [], 'orientation': 1}, b'x')",
    "orientation": "channel.send({'height': 1, 'width': 1, 'notes': [], 'orientation': 9}, b'xxx')",
    "notes": "channel.send({'height': 1, 'width': 1, 'notes': ['\\n'], 'orientation': 1}, b'xxx')",
    "many notes": "channel.send({'height': 1, 'width': 1, 'notes': ['x'] * 99, 'orientation': 1})",
    "an error text of several lines": "channel.send({'reason': 'input', 'error': 'a\\nb'})",
    "a long error text": "channel.send({'reason': 'input', 'error': 'a' * 5000})",
}


@pytest.mark.parametrize("code", LYING.values(), ids=LYING)
def test_replies_are_not_trusted(code: str, behaving: Callable[[str], None]) -> None:
    behaving(code)
    text = "image 1 is damaged: decoding it failed; save it again"
    with MediaWorkerPool(1) as pool, pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        decode(pool)


@pytest.mark.parametrize(
    "values",
    [
        {"height": 10**6, "width": 10**6},
        {"duration": float("nan")},
        {"duration": -1},
        {"fps": "2"},
        {"notes": None},
    ],
    ids=str,
)
def test_metadata_are_not_trusted(values: dict[str, Any], behaving: Callable[[str], None]) -> None:
    metadata = {"fps": 2.0, "duration": 1.0, "height": 4, "width": 4, "notes": []} | values
    behaving(f"nan = float('nan'); channel.send({{'metadata': {metadata}}}, bytes(8))")
    with MediaWorkerPool(1) as pool, pytest.raises(InputError, match="decoding it failed"):
        pool.open_video(b"x", LIMITS, "video 1", fps=2, apply_exif_orientation=True)


@pytest.mark.parametrize(
    "reply",
    [
        "{'height': 4, 'width': 4}, bytes(47)",
        "{'height': 4, 'width': 4}",
        "{'height': 10**6, 'width': 10**6}, bytes(9)",
        "{'done': True}",
        "{'metadata': None}",
        "{'metadata': {'fps': 2.0, 'duration': 1.0, 'height': 4, 'width': 4, 'notes': []}}",
    ],
)
def test_frames_are_not_trusted(reply: str, behaving: Callable[[str], None]) -> None:
    metadata = {"fps": 2.0, "duration": 1.0, "height": 4, "width": 4, "notes": []}
    opened = f"channel.send({{'metadata': {metadata}}}, bytes(8))"
    behaving(f"{opened} if header['job'] == 'video' else channel.send({reply})")
    with (
        MediaWorkerPool(1) as pool,
        closing(pool.open_video(b"x", LIMITS, "v", fps=2, apply_exif_orientation=True)) as reader,
        pytest.raises(InputError, match="v is damaged: decoding it failed; save it again"),
    ):
        frames_of(reader, [0])


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("os.abort()", "image 1 is damaged: decoding it failed"),
        ("os._exit(0)", "image 1 is damaged: decoding it failed"),
        ("os.kill(os.getpid(), signal.SIGXCPU)", r"image 1 took more than 0\.3 s to decode"),
        ("time.sleep(60)", r"image 1 took more than 0\.3 s to decode"),
        ("channel.send({'reason': 'bug', 'log': 'Traceback'})", "decoding it failed"),
    ],
)
def test_crashes_and_time_limits(
    code: str, text: str, behaving: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    behaving(code)
    with MediaWorkerPool(1, WorkerLimits(image_seconds=0.3)) as pool:
        with pytest.raises(InputError, match=text):
            decode(pool)
        monkeypatch.undo()
        wait_for(lambda: len(pool.worker_pids) == 1)
        assert decode_after_replacement(pool) == WANTED


def decode_after_replacement(pool: MediaWorkerPool) -> bytes:
    """Decode; workers that were started with the other code may still be there."""
    for _ in range(3):
        try:
            return decode(pool)
        except InputError:
            continue
    return decode(pool)


def test_memory_limit() -> None:
    limits = WorkerLimits(memory_bytes=512 * 1024**2)
    with MediaWorkerPool(1, limits) as pool:
        with pytest.raises(InputError, match="image 1 needs more than 512 MB of memory to decode"):
            decode(pool, png_header(10_000, 9_990))
        assert decode(pool) == WANTED
        with pytest.raises(InputError, match="has 134,217,729 bytes, limit is 134,217,728"):
            decode(pool, bytes(2**27 + 1))


def test_workers_are_replaced_after_many_jobs() -> None:
    with MediaWorkerPool(1, WorkerLimits(max_jobs=2)) as pool:
        (first,) = pool.worker_pids
        for _ in range(3):
            assert decode(pool) == WANTED
        assert first not in pool.worker_pids


@linux
@pytest.mark.parametrize("kind", ["real bomb", "header"])
def test_bombs_are_refused_at_once(kind: str, pool: MediaWorkerPool) -> None:
    """A PNG of 12,000 x 12,000: less than 50 ms of CPU and 32 MB, in the worker and here."""
    bomb = real_bomb() if kind == "real bomb" else png_header(30_000, 30_000)
    with MediaWorkerPool(1) as single:
        decode(single)
        (pid,) = single.worker_pids
        times, growth = [], []
        for _ in range(5):
            before = cpu_seconds(pid), resident_bytes(pid), resident_bytes(os.getpid())
            start = time.thread_time()
            with pytest.raises(InputError, match=r"50,000,000.*; resize it first"):
                decode(single, bomb, SERVER_LIMITS)
            times.append(cpu_seconds(pid) - before[0] + time.thread_time() - start)
            growth.append(resident_bytes(pid) - before[1])
            growth.append(resident_bytes(os.getpid()) - before[2])
        assert single.worker_pids == [pid]
    assert min(times) < 0.05
    assert max(growth) < 32 * 1024**2


def cpu_seconds(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# The pool -----------------------------------------------------------------------------------------


def test_start_and_close() -> None:
    pool = MediaWorkerPool(2)
    with pytest.raises(EngineError, match="not started"):
        decode(pool)
    with pool:
        pids = pool.worker_pids
        assert decode(pool) == WANTED
    assert not any(is_running(pid) for pid in pids)
    pool.close()
    for call in (lambda: decode(pool), pool.start, pool.wait_until_ready):
        with pytest.raises(EngineError, match="closed"):
            call()
    with pytest.raises(ConfigError, match="num_workers"):
        MediaWorkerPool(0)
    with pytest.raises(ConfigError, match="memory_bytes"):
        WorkerLimits(memory_bytes=1)
    with pytest.raises(ConfigError, match="max_jobs"):
        WorkerLimits(max_jobs=0)


def test_closing_ends_jobs(behaving: Callable[[str], None]) -> None:
    behaving("time.sleep(60)")
    errors: list[Exception] = []

    def job() -> None:
        try:
            decode(pool)
        except Exception as error:
            errors.append(error)

    with MediaWorkerPool(1) as pool:
        thread = threading.Thread(target=job)
        thread.start()
        wait_for(lambda: not pool._supervisor._idle)
    thread.join(10)
    assert [type(error) for error in errors] == [MediaWorkerError] and "closed" in str(errors[0])


def decode_until_closed(pool: MediaWorkerPool) -> None:
    with pytest.raises(EngineError):
        decode(pool)


def test_busy_workers(behaving: Callable[[str], None]) -> None:
    behaving("time.sleep(60)")
    with MediaWorkerPool(1, WorkerLimits(wait_seconds=0.2, image_seconds=60)) as pool:
        thread = threading.Thread(target=lambda: decode_until_closed(pool))
        thread.start()
        wait_for(lambda: not pool._supervisor._idle)
        with pytest.raises(MediaWorkersBusyError, match=r"all 1 media workers are busy for 0\.2 s"):
            decode(pool)
        pool.close()
        thread.join(10)


def test_workers_that_do_not_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_process, "_MAIN", "raise SystemExit(3)")
    with pytest.raises(EngineError, match=r"do not start: .*exit status 3"), MediaWorkerPool(1):
        pass
    assert "media workers cannot be started" in caplog.text


def test_the_confinement_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qwen2vl"), MediaWorkerPool(2) as pool:
        wait_for(lambda: len(pool._supervisor._idle) == 2)
    assert len([r for r in caplog.records if "2 processes of at most" in r.message]) == 1


@linux
def test_start_is_quick_and_without_torch(pool: MediaWorkerPool) -> None:
    pool.wait_until_ready()
    for pid in pool.worker_pids:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "torch" not in maps and "libavcodec" in maps
    with MediaWorkerPool(1) as fresh:
        assert cpu_seconds(fresh.worker_pids[0]) < 1.5  # a third of a second on an idle machine


@linux
def test_environment_of_a_worker(pool: MediaWorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2VL_API_KEY", "secret")
    with MediaWorkerPool(1) as fresh:
        (pid,) = fresh.worker_pids
        assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert [os.readlink(f"/proc/{pid}/fd/{n}") for n in range(3)] == ["/dev/null"] * 3
        assert len(os.listdir(f"/proc/{pid}/fd")) == 4
        limits = Path(f"/proc/{pid}/limits").read_text()
        for name, value in (("core file size", 0), ("file size", 0), ("open files", 16)):
            assert re.search(rf"Max {name} +{value} ", limits)
        assert re.search(r"Max address space +2147483648 ", limits)
