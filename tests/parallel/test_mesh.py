"""Device mesh: a single process without torch.distributed, sums over ranks, refused meshes."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

from qwen2vl.errors import ConfigError
from qwen2vl.parallel.mesh import DistributedContext, init_distributed, is_main_process
from tests.parallel.process_pool import ProcessPool


def test_single_process_collectives_are_no_ops() -> None:
    single = DistributedContext(torch.device("cpu"))
    tensor = torch.ones(2)
    assert single.all_reduce(tensor) is tensor and single.all_reduce_shards(tensor) is tensor
    single.barrier()
    assert single.shard_group is None
    assert not dist.is_initialized()


def test_rank_0_is_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, is_main in (("0", True), ("3", False)):
        monkeypatch.setenv("RANK", rank)
        assert is_main_process() == is_main
    monkeypatch.delenv("RANK")
    assert is_main_process()


def test_a_rank_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    text = r"device cuda: rank 5 of this machine has no GPU, there are 4; lower --nproc-per-node"
    with pytest.raises(ConfigError, match=text), init_distributed("cuda"):
        pass
    assert not dist.is_initialized()


@pytest.mark.parametrize("replicate", [0, -1, 3])
def test_dp_replicate_must_divide_the_world_size(
    monkeypatch: pytest.MonkeyPatch, replicate: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = (
        rf"mesh.dp_replicate={replicate}: 4 ranks cannot be divided into that many replicas; give"
    )
    with pytest.raises(ConfigError, match=text), init_distributed("cpu", dp_replicate=replicate):
        pass


def rank_sums(replicate: int) -> tuple[list[float], int, bool]:
    """Sum rank numbers over all ranks and over one replica; also whether the group is destroyed."""
    with init_distributed("cpu", dp_replicate=replicate) as distributed:
        rank = torch.tensor(float(distributed.rank))
        sums = [
            distributed.all_reduce(rank.clone()).item(),
            distributed.all_reduce_shards(rank.clone()).item(),
        ]
        assert distributed.mesh is not None and distributed.mesh.mesh_dim_names == (
            "replicate",
            "shard",
        )
        distributed.barrier()
        world_size = distributed.world_size
    return sums, world_size, dist.is_initialized()


def test_sums_are_over_all_ranks_or_over_the_shards_of_a_replica(process_pool: ProcessPool) -> None:
    results = process_pool.run(4, rank_sums, 2)
    assert [sums for sums, _, _ in results] == [[6.0, 1.0], [6.0, 1.0], [6.0, 5.0], [6.0, 5.0]]
    assert all(
        (world_size, still_initialized) == (4, False)
        for _, world_size, still_initialized in results
    )
