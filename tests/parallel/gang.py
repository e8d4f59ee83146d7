"""Several processes that work together, as torchrun would start them, for many tests in a row.

They are forked from a server that has imported everything once, and wait for jobs: functions of a
module, which every process calls with the same arguments and the environment of its rank.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined] - public by its documents

TIMEOUT = 150  # seconds for one job, on a machine that is busy with others

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.parallel.jobs"])


class Gang:
    """Processes with ranks; a job may use the first few of them."""

    def __init__(self, size: int) -> None:
        self.ends: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def run(self, size: int, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Let the first `size` processes do a job; return what each returned, rank 0 first."""
        # The store that torchrun's agent would keep; every job begins a group anew.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        for end in self.ends[:size]:
            end.send_bytes(pickle.dumps((environment, job, args)))
        results = []
        for rank, end in enumerate(self.ends[:size]):
            if not end.poll(TIMEOUT):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer; its stack is on stderr")
            problem, result = pickle.loads(end.recv_bytes())
            if problem:
                self.close()  # the others may wait for it for ever
                raise AssertionError(f"rank {rank} of {size}:\n{problem}")
            results.append(result)
        return results

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(rank: int, end: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    while True:
        environment, job, args = pickle.loads(end.recv_bytes())
        os.environ.update(environment)
        faulthandler.dump_traceback_later(TIMEOUT - 10)
        try:
            answer = ("", job(*args))
        except BaseException:
            answer = (traceback.format_exc(), None)
        faulthandler.cancel_dump_traceback_later()
        end.send_bytes(pickle.dumps(answer))
