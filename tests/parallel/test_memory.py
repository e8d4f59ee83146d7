"""The static-memory estimate equals the bytes of sharded weights, gradients, optimizer states."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.parallel.mesh import init_distributed
from qwen2vl.train.config import OptimConfig
from tests.parallel.process_pool import ProcessPool
from tests.parallel.training_jobs import IMAGES, TEXT, Case
from tests.train.dry_run.test_memory import case_train_config, estimate_static, measure_static


def measured_bytes_of_rank(case: Case) -> dict[str, int]:
    with init_distributed("cpu") as distributed:
        return measure_static(case, distributed)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_each_of_two_ranks_holds_its_estimated_shards(
    process_pool: ProcessPool, method: Any
) -> None:
    shares = (((TEXT,), (IMAGES,)),)
    case = Case(shares=shares, optim=OptimConfig(name=method), dtype="float32")
    first, second = process_pool.run(2, measured_bytes_of_rank, case)
    estimate = estimate_static(case_train_config(case), world_size=2)
    assert {name: getattr(estimate, name) for name in first} == first
    assert all(second[name] <= first[name] for name in first)
    assert estimate.gathered > 0
