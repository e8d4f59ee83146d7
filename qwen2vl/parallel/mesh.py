"""Process groups and device mesh of a distributed run, from torchrun's environment variables.

    torchrun --nproc-per-node 8      ranks 0 .. 7, dp_replicate=2:  shard ->  0 1 2 3
                                                               replicate |    4 5 6 7

Weights are sharded along a row of the mesh and replicated along a column: FSDP, or HSDP (hybrid
sharding) with `dp_replicate` above 1 (arXiv 2304.11277). A process that torchrun did not start has
no mesh, and torch.distributed is not initialized.
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

__all__ = ["DistributedContext", "init_distributed", "is_main_process"]


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """Rank, device and process groups of this process."""

    device: torch.device  # of this process
    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None  # dimensions "replicate" and "shard"; None: a single process
    cpu_group: dist.ProcessGroup | None = None  # gloo, all ranks: small CPU tensors
    checkpoint_group: dist.ProcessGroup | None = None  # gloo, all ranks: checkpoint thread

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that together hold one replica of the model."""
        return None if self.mesh is None else self.mesh.get_group("shard")

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks, in place, on its own device."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.cpu_group if tensor.device.type == "cpu" else None)
        return tensor

    def all_reduce_shards(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks of one replica, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.shard_group)
        return tensor

    def barrier(self) -> None:
        """Return once every rank has called it."""
        if self.mesh is not None:
            dist.barrier(group=self.cpu_group)


def is_main_process() -> bool:
    """Return whether this process has rank 0 (or is the only one); it alone prints."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def init_distributed(device: str, *, dp_replicate: int = 1) -> Iterator[DistributedContext]:
    """Initialize torch.distributed as torchrun's environment says; destroy it when the block ends.

    Args:
        device: cpu or cuda; with several ranks each uses the GPU of its local rank.
        dp_replicate: replicas of the model; the mesh is (dp_replicate, world size / dp_replicate).

    Raises:
        ConfigError: the world size is no multiple of `dp_replicate`, or a rank has no GPU.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if dp_replicate < 1 or world_size % dp_replicate:
        raise ConfigError(
            f"mesh.dp_replicate={dp_replicate}: {world_size} ranks cannot be divided "
            "into that many replicas; give a divisor of the number of ranks"
        )
    if world_size == 1:
        yield DistributedContext(torch.device(device))
        return
    local_device = _local_device(device)
    # Gloo beside NCCL: reducing numbers that the host reads must not wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if local_device.type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(
            local_device.type,
            (dp_replicate, world_size // dp_replicate),
            mesh_dim_names=("replicate", "shard"),
        )
        yield DistributedContext(
            local_device, dist.get_rank(), world_size, mesh, _new_gloo_group(), _new_gloo_group()
        )
    finally:
        dist.destroy_process_group()


def _local_device(name: str) -> torch.device:
    """Return the device of this rank: one GPU per local rank; the CPU is shared."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ConfigError(
            f"device {name}: rank {local_rank} of this machine has no GPU, there are {num_gpus}; "
            "lower --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _new_gloo_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "every rank is a member of the group"
    return group
