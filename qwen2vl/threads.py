"""CPU threads: how many a model runs on, and how they wait for each other.

torch runs an operation as an OpenMP parallel region, and its threads wait for each other by
spinning. Where another process holds one of the cores, two threads share the other one: each spins
through its time slice of 4 to 8 ms before the scheduler runs the thread it waits for, so that a
region of 13 us takes 8 ms. Threads that sleep give their core away, but waking one costs 20 us: too
much for a small model, whose regions are as short. Commands therefore let threads spin for as long
as a wakeup takes, and measure for a model whether more than one thread pays.

Nothing is changed at import: libgomp reads its variables once, when torch is imported, and the
number of threads is a setting of the whole process. docs/performance.md says what a program sets.
What is measured of a call is a warning only (`warn_if_preempted`).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from math import ceil, inf
from pathlib import Path
from statistics import median

__all__ = [
    "available_cpus",
    "batch_threads",
    "default_num_threads",
    "is_num_threads_given",
    "limit_spinning",
    "measure_num_threads",
    "set_num_threads_batch",
    "threads_spin",
    "wait_policy",
    "warn_if_preempted",
]

logger = logging.getLogger(__name__)

# Any of them is a choice of the user's: of libgomp (Linux) and LLVM's OpenMP (macOS).
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
NUM_THREADS_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")

# Iterations of libgomp's loop: about 30 us. Training nano on two threads was as fast as with the
# default of 300,000 (several ms), and beside a busy process 1.7 times slower in place of 3 times.
SPIN_COUNT = 1500

NUM_ROUNDS = 5
MIN_ROUNDS = 2
# Fewer threads are preferred to a gain below this: they leave cores to others, and never wait.
MIN_GAIN = 1.05
# Involuntary context switches: a few a second on a quiet machine; 180 to 260 with two threads that
# spin on two cores, one of which a busy process holds.
MIN_PREEMPTIONS = 50  # a second
MIN_SECONDS = 0.3  # of a call, to be judged

MAX_SLOWDOWN = 3.0  # in the first run; a number that is slower, and those below, are not tried on


def limit_spinning(environ: MutableMapping[str, str] | None = None) -> None:
    """Let OpenMP threads spin shortly and then sleep, unless a variable of the user's decides.

    Has an effect before torch is imported only, and on child processes. (libgomp: GOMP_SPINCOUNT.)
    """
    environ = os.environ if environ is None else environ
    if not any(name in environ for name in WAIT_VARIABLES):
        environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def wait_policy() -> str:
    """Return the variable that decides how OpenMP threads wait, as NAME=VALUE."""
    given = [f"{name}={os.environ[name]}" for name in WAIT_VARIABLES if name in os.environ]
    return ", ".join(given) or "GOMP_SPINCOUNT not set: threads spin for milliseconds"


def threads_spin() -> bool:
    """Whether OpenMP threads spin for milliseconds while they wait: no variable limits it."""
    for name in WAIT_VARIABLES[1:]:
        value = os.environ.get(name, "").strip()
        if value.isdigit():
            return int(value) > 10 * SPIN_COUNT
    return os.environ.get("OMP_WAIT_POLICY", "").strip().lower() != "passive"


_has_warned = False


@contextmanager
def warn_if_preempted() -> Iterator[None]:
    """Measure the work inside on the CPU; log a warning, once, if its threads spun in vain.

    Two system calls, on Linux; elsewhere nothing is measured.
    """
    global _has_warned
    if _has_warned or sys.platform != "linux" or not threads_spin():
        yield
        return
    num_before, began = _num_preemptions(), time.perf_counter()
    yield
    num, seconds = _num_preemptions() - num_before, time.perf_counter() - began
    if seconds < MIN_SECONDS or num < MIN_PREEMPTIONS * seconds or _num_torch_threads() == 1:
        return
    _has_warned = True
    logger.warning(
        "threads were preempted %d times in %.1f s, and the others spun meanwhile: another process "
        "uses the CPUs; start with GOMP_SPINCOUNT=%d, or call torch.set_num_threads(1) "
        "(docs/performance.md, Threads)",
        num,
        seconds,
        SPIN_COUNT,
    )


def _num_preemptions() -> int:
    """Count the involuntary context switches of this process so far, of all its threads."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _num_torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def is_num_threads_given() -> bool:
    """Whether an environment variable sets the number of threads."""
    return any(name in os.environ for name in NUM_THREADS_VARIABLES)


def available_cpus() -> int:
    """Count the CPUs that this process may use: its affinity mask and its cgroup's quota."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, ceil(int(quota) / int(period))))


def default_num_threads() -> int:
    """Return the smaller of torch's number of threads and the available CPUs."""
    import torch

    return min(torch.get_num_threads(), available_cpus())


def measure_num_threads(
    run: Callable[[], object],
    *,
    max_threads: int | None = None,
    max_seconds: float = 1.0,
    slow_seconds: float = inf,
) -> int:
    """Measure at which number of torch threads `run` is fastest; the setting is restored.

    Tries `max_threads` (default: `default_num_threads`) and its halves down to 1, interleaved; of
    those within 5 % of the fastest the smallest is returned. Halving ends at a number that is far
    slower, since one thread of sixteen could take minutes.

    Args:
        run: the work, such as a decode step; called at least three times for each number.
        max_threads: the largest number to try.
        max_seconds: no further round is begun after this time.
        slow_seconds: `max_threads` is returned if its first two runs take longer, without other
            trials: the operations of a large model gain from every core.
    """
    import torch

    setting = torch.get_num_threads()
    most = max_threads or default_num_threads()
    if most == 1:
        return most
    deadline = time.perf_counter() + max_seconds
    try:
        # First runs start threads and create oneDNN's primitives.
        fastest = _time_run(run, most)
        if fastest > slow_seconds and _time_run(run, most) > slow_seconds:
            return most
        seconds: dict[int, list[float]] = {most: []}
        count = most
        while count > 1:
            count //= 2
            first = _time_run(run, count)
            fastest = min(fastest, first)
            if first > MAX_SLOWDOWN * fastest:
                break
            seconds[count] = []
        for round_index in range(NUM_ROUNDS):
            if round_index >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for count, own in seconds.items():
                own.append(_time_run(run, count))
    finally:
        torch.set_num_threads(setting)
    times = {count: median(own) for count, own in seconds.items()}
    return min(count for count in times if times[count] <= MIN_GAIN * min(times.values()))


_num_threads_batch: int | None = None  # None: the setting of torch
# Rows of a forward (tokens or patches) from which it runs on these threads. With nano 256 patches
# took 6 to 7 ms on two threads and 8 to 9 on one, but 181 tokens 15 and 5.5: threads are woken.
MIN_BATCH_ROWS = 256


def set_num_threads_batch(count: int | None) -> None:
    """Set the torch threads of forwards of many rows: prefill and the vision encoder.

    Their operations gain from more threads than those of a decode step, which run on
    `torch.get_num_threads()`. The setting holds for all engines of the process; None undoes it.
    (llama.cpp: --threads-batch.)
    """
    global _num_threads_batch
    assert count is None or count >= 1, f"{count} threads"
    _num_threads_batch = count


@contextmanager
def batch_threads(num_rows: int) -> Iterator[None]:
    """Run a forward of `num_rows` tokens or patches on the threads of `set_num_threads_batch`."""
    if _num_threads_batch is None or num_rows < MIN_BATCH_ROWS:
        yield
        return
    import torch

    setting = torch.get_num_threads()
    torch.set_num_threads(_num_threads_batch)
    try:
        yield
    finally:
        torch.set_num_threads(setting)


def _time_run(run: Callable[[], object], num_threads: int) -> float:
    import torch

    torch.set_num_threads(num_threads)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
