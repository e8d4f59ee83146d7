"""Processes of the server benchmarks: start, readiness, CPU time, memory, open files, children."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = [
    "ProcessUsage",
    "ServerProcess",
    "child_pids",
    "free_port",
    "media_worker_pids",
    "qwen2vl_command",
    "reset_peak_memory",
    "wait_until",
]

TICKS = os.sysconf("SC_CLK_TCK")  # of CPU time, a second


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(
    condition: Callable[[], object], seconds: float, what: str, interval: float = 0.01
) -> None:
    """Call `condition` until it is true.

    Raises:
        TimeoutError: it did not become true within `seconds`.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(interval)


def qwen2vl_command(port: int, *options: str) -> list[str]:
    """Return the command of our server on nano."""
    return [sys.executable, "-m", "qwen2vl", "serve", "--port", str(port), *options]


def child_pids(pid: int) -> list[int]:
    """List the processes started by `pid` and by those, as far as they run."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *child_pids(int(child))]
    return found


def media_worker_pids(pid: int) -> list[int]:
    """List the decoding workers of a server."""
    return [child for child in child_pids(pid) if b"media_worker" in _read(child, "cmdline")]


def reset_peak_memory(pid: int) -> None:
    """Let the peak of the resident memory start from its present size."""
    for process in (pid, *child_pids(pid)):
        with contextlib.suppress(OSError):
            Path(f"/proc/{process}/clear_refs").write_text("5")


@dataclass(frozen=True)
class ProcessUsage:
    """What a server and its child processes use."""

    rss_mib: float
    peak_mib: float
    cpu_seconds: float
    open_files: int
    num_processes: int

    @classmethod
    def of(cls, pid: int) -> ProcessUsage:
        """Add up a process and its children; ended children count by their CPU time."""
        pids = [pid, *child_pids(pid)]
        memory = [_memory(process) for process in pids]
        return cls(
            rss_mib=sum(rss for rss, _ in memory),
            peak_mib=sum(peak for _, peak in memory),
            cpu_seconds=sum(_cpu_seconds(process) for process in pids),
            open_files=sum(_open_files(process) for process in pids),
            num_processes=len(pids),
        )


def _read(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def _memory(pid: int) -> tuple[float, float]:
    values = {}
    for line in _read(pid, "status").decode().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            values[name] = int(value.split()[0]) / 1024
    return values.get("VmRSS", 0.0), values.get("VmHWM", 0.0)


def _cpu_seconds(pid: int) -> float:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return sum(int(field) for field in fields[11:15]) / TICKS if fields else 0.0


def _open_files(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


class ServerProcess:
    """A server that is started, awaited and stopped; a context manager."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        *,
        ready_path: str = "/ready",
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.command, self.port, self.ready_path, self.log = list(command), port, ready_path, log
        self.environment, self.cwd = environment, cwd
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, timeout: float = 120.0) -> float:
        """Start the process; return the seconds from exec to the first 200 of the ready path.

        Raises:
            RuntimeError: it ended, with the last line of its log.
            TimeoutError: it was not ready in time.
        """
        log = Path(os.devnull) if self.log is None else self.log
        started = time.perf_counter()
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | (self.environment or {}),
                cwd=self.cwd,
            )
        try:
            wait_until(self._is_ready, timeout, f"{self.ready_path} of {self.command[:4]}", 0.005)
        except BaseException:
            self.kill()
            raise
        return time.perf_counter() - started

    def _is_ready(self) -> bool:
        assert self.process is not None
        if (code := self.process.poll()) is not None:
            text = self.log.read_text(errors="replace") if self.log is not None else ""
            raise RuntimeError(f"the server ended with {code}: {text.strip()[-500:]}")
        return self.get_status(self.ready_path) == 200

    def get_status(self, path: str, timeout: float = 10.0) -> int:
        """Return the status of one GET request, 0 where there is no answer."""
        return self.get(path, timeout)[0]

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
        """Return status and body of one GET request, (0, b"") where there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def usage(self) -> ProcessUsage:
        """Return what the server and its child processes use now."""
        return ProcessUsage.of(self.pid)

    def terminate(self, timeout: float = 30.0) -> int:
        """Send SIGTERM and return the exit code.

        Raises:
            TimeoutError: it did not end in time; it is killed.
        """
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise TimeoutError(f"not ended {timeout:.0f} s after SIGTERM") from error

    def kill(self) -> None:
        """Kill the process if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            try:
                self.terminate()
            except TimeoutError:
                self.kill()
