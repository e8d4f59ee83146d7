"""Of sharded weights, gradients and moments each rank has what was predicted."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.parallel.mesh import join
from qwen2vl.train.config import OptimConfig
from tests.parallel.gang import Gang
from tests.parallel.jobs import PICTURES, TEXT, Case
from tests.train.dry_run.test_memory import measured, of_case, stored


def bytes_of_rank(case: Case) -> dict[str, int]:
    with join("cpu") as ranks:
        return measured(case, ranks)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_of_two_ranks_each_has_its_part(gang: Gang, method: Any) -> None:
    shares = (((TEXT,), (PICTURES,)),)
    case = Case(shares=shares, optim=OptimConfig(method=method), dtype="float32")
    first, second = gang.run(2, bytes_of_rank, case)
    told = stored(of_case(case), ranks=2)
    assert {name: getattr(told, name) for name in first} == first
    assert all(second[name] <= first[name] for name in first)
    assert told.gathered > 0
