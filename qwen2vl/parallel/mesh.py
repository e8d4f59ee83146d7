"""Who takes part in a run: the processes that torchrun started, as a mesh of ranks.

    torchrun --nproc-per-node 8      ranks 0 .. 7, replicate=2:     shard ->  0 1 2 3
                                                               replicate |    4 5 6 7

Weights are sharded along a row and copied along a column. A process that nobody started so is a
run of one: it gets no mesh, and torch.distributed stays asleep. It must not know models or data.
(FSDP, arXiv 2304.11277; rows and columns: its hybrid sharding.) Next room: shard.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwen2vl.errors import ConfigError

__all__ = ["Ranks", "is_first", "join"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of its run."""

    device: torch.device  # of this process alone
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # axes "replicate" and "shard"; None: a run of one
    control: dist.ProcessGroup | None = None  # all ranks, for a few numbers on the CPU
    saving: dist.ProcessGroup | None = None  # all ranks, for a thread that writes checkpoints

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold one copy of the model together."""
        return None if self.mesh is None else self.mesh.get_group("shard")

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up over all ranks, in place, where the tensor is."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None)
        return tensor

    def sum_of_shards(self, tensor: Tensor) -> Tensor:
        """Add up over the ranks that hold one copy of the model, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.shard_group)
        return tensor

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        if self.mesh is not None:
            dist.barrier(group=self.control)


def is_first() -> bool:
    """Tell whether this process speaks for its run."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join(device: str, *, replicate: int = 1) -> Iterator[Ranks]:
    """Take part in the run that torchrun's environment describes, until the block ends.

    Args:
        device: cpu or cuda; with several ranks each takes the one of its local rank.
        replicate: copies of the model; the ranks are replicate x shard.

    Raises:
        ConfigError: the number of ranks is no multiple of `replicate`, or a rank has no device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if replicate < 1 or size % replicate:
        raise ConfigError(
            f"mesh.replicate={replicate}: {size} ranks cannot be parted so; "
            "give a divisor of the number of ranks"
        )
    if size == 1:
        yield Ranks(torch.device(device))
        return
    own = _own_device(device)
    # Gloo beside NCCL: numbers that the host reads must not wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(
            own.type, (replicate, size // replicate), mesh_dim_names=("replicate", "shard")
        )
        yield Ranks(own, dist.get_rank(), size, mesh, _cpu_group(), _cpu_group())
    finally:
        dist.destroy_process_group()


def _own_device(name: str) -> torch.device:
    """Give each rank of a machine its own GPU; CPUs are shared."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    local, present = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= present:
        raise ConfigError(
            f"device {name}: rank {local} of this machine has no GPU, there are {present}; "
            "lower --nproc-per-node"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _cpu_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    return group
