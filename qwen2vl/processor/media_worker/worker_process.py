"""One media worker as its parent sees it: start, jobs, and why it ended.

The child gets an environment of its own, no standard streams, "/" as its folder and one socket.
Its import paths are those of the packages that it needs: neither the current folder nor the
parent's PYTHONPATH is searched (python -I -S).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen2vl.errors import ConfigError, MediaWorkerError
from qwen2vl.processor.media_worker.protocol import (
    Channel,
    ChannelClosedError,
    ProtocolError,
    read_texts,
)

__all__ = ["WorkerLimits", "WorkerProcess"]

_MAIN = (
    "import json, sys; settings = json.loads(sys.argv[2]); sys.path += settings['path']; "
    "from qwen2vl.processor.media_worker.worker import main; main(int(sys.argv[1]), settings)"
)
_PACKAGES = ("qwen2vl", "numpy", "PIL", "av")
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    # Threads reserve address space, and the worker computes nothing with BLAS.
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    # Pages of pictures are kept for the next one: fetching them from the kernel again takes time.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 28),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 26),
}
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_ENDED_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """Limits on the media workers of a pool. The time of a video is `MediaLimits.decode_timeout`.

    Raises:
        ConfigError: a value is not positive, or there is too little memory to start.
    """

    memory_bytes: int = 2 * 1024**3  # address space of one worker
    image_seconds: float = 20.0  # for one image, as wall-clock time and as CPU time
    start_seconds: float = 60.0  # for starting a worker
    wait_seconds: float = 60.0  # for a worker to become free
    max_jobs: int = 2000  # after which a worker is replaced
    nice: int = 0  # added to the niceness of a worker; on a busy machine it costs latency

    def __post_init__(self) -> None:
        if self.memory_bytes < 512 * 1024**2:
            raise ConfigError(
                f"memory_bytes of a media worker is {self.memory_bytes:,}, must be at least "
                f"{512 * 1024**2:,}"
            )
        for name in ("image_seconds", "start_seconds", "wait_seconds", "max_jobs"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} of a media worker must be greater than 0")


class WorkerProcess:
    """A running worker. One thread at a time uses it."""

    def __init__(self, limits: WorkerLimits) -> None:
        """Start the process; `wait_until_ready` waits for it.

        The worker ends when the thread that starts it ends.

        Raises:
            EngineError: it cannot be started.
        """
        self.num_jobs = 0
        own, other = socket.socketpair()
        self.channel = Channel(own)
        settings = {
            "path": _import_paths(),
            "folders": _readable_folders(),
            "parent": os.getpid(),
            "memory_bytes": limits.memory_bytes,
            "nice": limits.nice,
        }
        command = [sys.executable, "-I", "-S", "-B", "-c", _MAIN, str(other.fileno())]
        try:
            self._process = subprocess.Popen(
                [*command, json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(other.fileno(),),
                cwd="/",
                env=_ENVIRONMENT | {k: os.environ[k] for k in _INHERITED if k in os.environ},
                start_new_session=True,  # Ctrl-C at the server's terminal is not for the workers
            )
        except OSError as error:
            own.close()
            raise MediaWorkerError(f"a media worker cannot be started: {error.strerror}") from error
        finally:
            other.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def wait_until_ready(self, seconds: float) -> tuple[str, ...] | None:
        """Wait until the worker takes jobs; return its confinement, as words for the log.

        Returns None for a worker that another process has killed meanwhile.

        Raises:
            EngineError: it ended or did not answer; it has been killed.
        """
        self.channel.deadline = time.monotonic() + seconds
        try:
            header, _ = self.channel.receive()
            if "ready" not in header:
                raise ProtocolError(str(header.get("log", "no reason given")))
            return read_texts(header.get("confinement"))
        except ChannelClosedError as error:
            if self.end() == "outside":
                return None
            text = f"exit status {self._process.returncode}"
            raise MediaWorkerError(f"a media worker did not start: {text}") from error
        except (ProtocolError, TimeoutError) as error:
            self.kill()
            text = str(error) or f"no answer in {seconds:g} s"
            raise MediaWorkerError(f"a media worker did not start: {text}") from error

    def begin_job(self, header: dict[str, Any], payload: Any, cpu_seconds: float) -> None:
        """Send a job, on which the worker may spend `cpu_seconds`."""
        self.num_jobs += 1
        self.channel.send({**header, "cpu_seconds": cpu_seconds}, payload)

    def has_ended(self) -> bool:
        """Return whether an idle worker can take no job any more."""
        return self._process.poll() is not None or self.channel.has_ended()

    def terminate(self) -> None:
        """End the process, as seen by another thread: the one that uses it finds it ended."""
        if self._process.poll() is None:
            self._process.kill()

    def kill(self) -> int:
        """End the process and reap it; return its exit status, negative for a signal.

        A process that has ended by itself keeps the status of its end.
        """
        self.channel.close()
        self.terminate()
        return self._process.wait()

    def end(self, seconds: float = 1.0) -> str:
        """Find out why the worker closed its socket; end and reap it.

        Returns:
            "outside" if it was killed by another process (or for lack of memory in the whole
            machine), "time" after its CPU time, "crash" for anything else.
        """
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = 0  # alive without its socket
        self.kill()
        if code == -signal.SIGXCPU:
            return "time"
        return "outside" if -code in _ENDED_FROM_OUTSIDE else "crash"


@cache
def _package_folders() -> tuple[str, ...]:
    """Return the folders of the packages that a worker imports, by their real paths."""
    specs = [find_spec(name) for name in _PACKAGES]
    origins = [spec.origin for spec in specs if spec is not None and spec.origin]
    return tuple(str(Path(origin).resolve().parent) for origin in origins)


def _import_paths() -> list[str]:
    return list(dict.fromkeys(str(Path(folder).parent) for folder in _package_folders()))


def _readable_folders() -> list[str]:
    """Return the folders of the packages, of their libraries, and of the standard library."""
    standard = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    libraries = [str(path) for folder in _import_paths() for path in Path(folder).glob("*.libs")]
    folders = [*standard, *_package_folders(), *libraries]
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
