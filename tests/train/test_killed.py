"""kill -9 at random moments of a save: what was on disk before still loads, bit for bit.

Processes that save without end are killed while they write; what they said is what is judged. The
slow test does so two hundred times to processes of their own, spawned, that save all of nano.
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
from qwen2vl.parallel.mesh import Ranks
from qwen2vl.train import checkpoint
from qwen2vl.train.checkpoint import Saver
from tests.parallel.gang import FORKS

ONE = Ranks(torch.device("cpu"))

Make = Callable[[int], dict[str, Tensor]]


def small(step: int) -> dict[str, Tensor]:
    """Make tensors that a step can be told from."""
    return {f"w{i}": torch.full((64, 256), float(step)) for i in range(8)}


@cache
def nano_weights() -> dict[str, Tensor]:
    return load("nano", dtype="float32")[0].state_dict()


def nano(step: int) -> dict[str, Tensor]:
    """Make nano's weights and two moments of each, moved by the step's number."""
    moved = {name: tensor + step for name, tensor in nano_weights().items()}
    moments = ("exp_avg", "exp_avg_sq")
    return moved | {f"{n}|{key}": t * 0.5 for n, t in moved.items() for key in moments}


def save_without_end(folder: Path, make: Make, talk: Connection) -> None:
    """Get ready, wait for a step to go on from, then save one after the other and say so."""
    torch.set_num_threads(1)
    make(0)
    step = talk.recv()
    saver = Saver(folder, 2, ONE)
    while True:
        step += 1
        saver.save(step, make(step), {"config": {}})
        talk.send(step)  # its tensors are copied; now it is being written


class Victim:
    """A process that saves; it gets ready while the one before it is killed."""

    def __init__(self, context: BaseContext, folder: Path, make: Make) -> None:
        self.talk, self.theirs = context.Pipe()  # theirs stays open: what was said can be heard
        self.process = context.Process(  # type: ignore[attr-defined] - every context has it
            target=save_without_end, args=(folder, make, self.theirs), daemon=True
        )
        self.process.start()

    def kill_in_a_save(self, draw: random.Random, step: int) -> int:
        """Let it go on from a step, and kill it at a random moment; gives its last save."""
        self.talk.send(step)
        times: list[float] = []
        begun = step
        for _ in range(draw.randint(2, 4)):
            begun = self.talk.recv()
            times.append(time.monotonic())
        each = median(later - sooner for sooner, later in pairwise(times))
        time.sleep(draw.random() * 1.2 * each)
        self.process.kill()
        self.process.join()
        while self.talk.poll():
            begun = self.talk.recv()
        return begun


def kill_while_saving(
    context: BaseContext, folder: Path, make: Make, *, tries: int, seed: int
) -> int:
    """Kill so often, each time judging what is on disk; gives how often a save was cut short."""
    draw = random.Random(seed)
    step = cut = 0
    victim = Victim(context, folder, make)
    for number in range(tries):
        following = Victim(context, folder, make) if number + 1 < tries else victim
        begun = victim.kill_in_a_save(draw, step)
        path = checkpoint.latest(folder)
        # A save begins when the one before it is on disk, so all but the last must be.
        assert path is not None
        checkpoint.verify(path, ONE)
        step = checkpoint.read_state(path)["step"]
        assert step in (begun - 1, begun)
        cut += step == begun - 1
        wanted = make(step)
        found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
        checkpoint.read(path, found, ONE)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        victim = following
    return cut


def test_killed_while_it_saves_the_checkpoint_before_loads(tmp_path: Path) -> None:
    kill_while_saving(FORKS, tmp_path, small, tries=4, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_two_hundred_times_the_checkpoint_before_loads(tmp_path: Path) -> None:
    cut = kill_while_saving(get_context("spawn"), tmp_path, nano, tries=200, seed=1)
    assert cut > 50  # many moments of a process that does nothing but save lie in a save
