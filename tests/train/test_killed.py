"""Crash safety of checkpoints: after SIGKILL during a save the previous one loads, bit for bit.

Processes that save in an endless loop are killed while they write; they report every save that they
started. The slow test kills two hundred spawned processes that save all of nano.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from qwen2vl.loading import load
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.train import checkpoint
from qwen2vl.train.checkpoint import CheckpointSaver
from tests.parallel.process_pool import FORKSERVER

SINGLE_PROCESS = DistributedContext(torch.device("cpu"))

MakeTensors = Callable[[int], dict[str, Tensor]]


def small_tensors(step: int) -> dict[str, Tensor]:
    """Return tensors from which the step can be identified."""
    return {f"w{i}": torch.full((64, 256), float(step)) for i in range(8)}


@cache
def nano_weights() -> dict[str, Tensor]:
    return load("nano", dtype="float32")[0].state_dict()


def nano_tensors(step: int) -> dict[str, Tensor]:
    """Return nano's weights and two moments of each, shifted by the step."""
    shifted = {name: tensor + step for name, tensor in nano_weights().items()}
    moments = ("exp_avg", "exp_avg_sq")
    return shifted | {f"{n}|{key}": t * 0.5 for n, t in shifted.items() for key in moments}


def save_forever(folder: Path, make_tensors: MakeTensors, connection: Connection) -> None:
    """Start up, receive the step to continue from, then save in a loop and send each step."""
    torch.set_num_threads(1)
    make_tensors(0)
    step = connection.recv()
    saver = CheckpointSaver(folder, 2, SINGLE_PROCESS)
    while True:
        step += 1
        saver.save(step, make_tensors(step), {"config": {}})
        connection.send(step)  # its tensors are copied, and it is being written


class SavingProcess:
    """A process that saves in a loop; it starts up while the previous one is running."""

    def __init__(self, context: BaseContext, folder: Path, make_tensors: MakeTensors) -> None:
        # The child's end stays open here, so that messages can be received after its death.
        self.connection, self.child_end = context.Pipe()
        self.process = context.Process(  # type: ignore[attr-defined] - every context has it
            target=save_forever, args=(folder, make_tensors, self.child_end), daemon=True
        )
        self.process.start()

    def kill_during_save(self, rng: random.Random, step: int) -> int:
        """Continue from `step`, kill the process at a random moment; return its last save."""
        self.connection.send(step)
        times: list[float] = []
        last_started = step
        for _ in range(rng.randint(2, 4)):
            last_started = self.connection.recv()
            times.append(time.monotonic())
        save_seconds = median(end - start for start, end in pairwise(times))
        time.sleep(rng.random() * 1.2 * save_seconds)
        self.process.kill()
        self.process.join()
        while self.connection.poll():
            last_started = self.connection.recv()
        return last_started


def kill_while_saving(
    context: BaseContext, folder: Path, make_tensors: MakeTensors, *, num_kills: int, seed: int
) -> int:
    """Kill and check the files `num_kills` times; return how many saves were cut short."""
    rng = random.Random(seed)
    step = num_cut = 0
    process = SavingProcess(context, folder, make_tensors)
    for index in range(num_kills):
        next_process = (
            SavingProcess(context, folder, make_tensors) if index + 1 < num_kills else process
        )
        last_started = process.kill_during_save(rng, step)
        path = checkpoint.latest_checkpoint(folder)
        # A save starts once the previous one is on disk, so only the last may be missing.
        assert path is not None
        checkpoint.verify(path, SINGLE_PROCESS)
        step = checkpoint.read_manifest(path)["step"]
        assert step in (last_started - 1, last_started)
        num_cut += step == last_started - 1
        expected = make_tensors(step)
        loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        checkpoint.load_tensors(path, loaded, SINGLE_PROCESS)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
        process = next_process
    return num_cut


def test_the_previous_checkpoint_loads_after_a_kill_during_a_save(tmp_path: Path) -> None:
    kill_while_saving(FORKSERVER, tmp_path, small_tensors, num_kills=4, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_previous_checkpoint_loads_after_two_hundred_kills(tmp_path: Path) -> None:
    num_cut = kill_while_saving(get_context("spawn"), tmp_path, nano_tensors, num_kills=200, seed=1)
    assert num_cut > 50  # the process spends most of its time saving
