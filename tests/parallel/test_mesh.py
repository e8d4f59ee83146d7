"""Who takes part: alone without any of torch.distributed, and each rank with its own device."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

from qwen2vl.errors import ConfigError
from qwen2vl.parallel.mesh import Ranks, is_first, join
from tests.parallel.gang import Gang


def test_alone_there_is_nobody_to_wait_for() -> None:
    one = Ranks(torch.device("cpu"))
    tensor = torch.ones(2)
    assert one.sum(tensor) is tensor and one.sum_of_shards(tensor) is tensor
    one.wait_for_all()
    assert one.shard_group is None
    assert not dist.is_initialized()


def test_the_first_speaks_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, first in (("0", True), ("3", False)):
        monkeypatch.setenv("RANK", rank)
        assert is_first() == first
    monkeypatch.delenv("RANK")
    assert is_first()


def test_a_rank_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    text = r"device cuda: rank 5 of this machine has no GPU, there are 4; lower --nproc-per-node"
    with pytest.raises(ConfigError, match=text), join("cuda"):
        pass
    assert not dist.is_initialized()


@pytest.mark.parametrize("replicate", [0, -1, 3])
def test_copies_must_divide_the_ranks(monkeypatch: pytest.MonkeyPatch, replicate: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = rf"mesh.replicate={replicate}: 4 ranks cannot be parted so; give a divisor"
    with pytest.raises(ConfigError, match=text), join("cpu", replicate=replicate):
        pass


def sums(replicate: int) -> tuple[list[float], int, bool]:
    """Add ranks up over all and over a copy; say what is left when the block ends."""
    with join("cpu", replicate=replicate) as ranks:
        own = torch.tensor(float(ranks.rank))
        found = [ranks.sum(own.clone()).item(), ranks.sum_of_shards(own.clone()).item()]
        assert ranks.mesh is not None and ranks.mesh.mesh_dim_names == ("replicate", "shard")
        ranks.wait_for_all()
        size = ranks.size
    return found, size, dist.is_initialized()


def test_sums_go_over_all_or_over_the_shards_of_a_copy(gang: Gang) -> None:
    results = gang.run(4, sums, 2)
    assert [found for found, _, _ in results] == [[6.0, 1.0], [6.0, 1.0], [6.0, 5.0], [6.0, 5.0]]
    assert all((size, left) == (4, False) for _, size, left in results)
