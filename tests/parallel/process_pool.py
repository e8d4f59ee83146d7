"""A persistent pool of rank processes, with the environment of torchrun, for distributed tests.

The processes are forked from a forkserver that has imported everything once, and wait for jobs:
functions that every process calls with the same arguments. (Compare torch's
MultiProcContinuousTest.)
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
from torch.distributed import TCPStore  # type: ignore[attr-defined] - documented as public

TIMEOUT = 150  # seconds for one job, on a busy machine

FORKSERVER = get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.parallel.training_jobs"])


class ProcessPool:
    """Worker processes by rank; a job may use the first few of them."""

    def __init__(self, size: int) -> None:
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            parent_end, child_end = FORKSERVER.Pipe()
            process = FORKSERVER.Process(target=_worker_loop, args=(rank, child_end), daemon=True)
            process.start()
            child_end.close()
            self.connections.append(parent_end)
            self.processes.append(process)

    def run(self, size: int, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a job on the first `size` processes; return the results by rank."""
        # In place of the store of torchrun's agent; every job initializes a new process group.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        for connection in self.connections[:size]:
            connection.send_bytes(pickle.dumps((environment, job, args)))
        results = []
        for rank, connection in enumerate(self.connections[:size]):
            if not connection.poll(TIMEOUT):
                self.close()
                raise TimeoutError(f"rank {rank} did not reply; its stack is on stderr")
            error, result = pickle.loads(connection.recv_bytes())
            if error:
                self.close()  # the other ranks may wait for it forever
                raise AssertionError(f"rank {rank} of {size}:\n{error}")
            results.append(result)
        return results

    def close(self) -> None:
        """Kill all processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _worker_loop(rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    while True:
        environment, job, args = pickle.loads(connection.recv_bytes())
        os.environ.update(environment)
        faulthandler.dump_traceback_later(TIMEOUT - 10)
        try:
            reply = ("", job(*args))
        except BaseException:
            reply = (traceback.format_exc(), None)
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(pickle.dumps(reply))
