"""Pooling by hand: which rows count, in which precision, and that neighbors do not matter."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.engine.embed import Pooling, pool

WAYS = get_args(Pooling)


def test_the_last_row_of_each() -> None:
    hidden_TD = torch.tensor([[9.0, 9.0], [3.0, 4.0], [0.0, -2.0]])
    assert torch.allclose(pool(hidden_TD, [2, 1]), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


def test_the_mean_of_each() -> None:
    hidden_TD = torch.tensor([[6.0, 0.0], [0.0, 8.0], [0.0, -2.0]])
    pooled_SD = pool(hidden_TD, [2, 1], "mean")
    assert torch.allclose(pooled_SD, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
@pytest.mark.parametrize("way", WAYS)
def test_each_is_pooled_as_if_alone(way: Pooling, lengths: list[int], seed: int) -> None:
    hidden_TD = torch.randn(sum(lengths), 8, generator=torch.Generator().manual_seed(seed))
    pooled_SD = pool(hidden_TD, lengths, way)
    assert torch.allclose(pooled_SD.norm(dim=-1), torch.ones(len(lengths)))
    for part_TD, row_D in zip(hidden_TD.split(lengths), pooled_SD, strict=True):
        assert torch.equal(pool(part_TD, [len(part_TD)], way)[0], row_D)


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_is_pooled_in_float32(way: Pooling) -> None:
    hidden_TD = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    pooled_SD = pool(hidden_TD, [5000], way)
    assert pooled_SD.dtype == torch.float32
    torch.testing.assert_close(pooled_SD, pool(hidden_TD.float(), [5000], way))


@pytest.mark.parametrize("lengths", [[2, 2], [0, 3], [4]])
def test_lengths_must_cover_the_states(lengths: list[int]) -> None:
    with pytest.raises(AssertionError, match="lengths do not cover"):
        pool(torch.randn(3, 4), lengths)
