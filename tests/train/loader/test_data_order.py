"""Data order: a pure function; no sample twice, and ranks share the samples of a step."""

import time

import numpy as np
import pytest

from qwen2vl.data.bin_packing import BinPlan, pack_bins
from qwen2vl.recipes import tiny
from qwen2vl.train.config import override
from qwen2vl.train.loader.data_order import bins_of_rank, bins_of_step, locate_step, samples_of_step

CONFIG = override(tiny.recipe(), ["stages.0.steps=3", "stages.1.steps=0", "stages.2.steps=4"])


def test_locate_step_skips_an_empty_stage() -> None:
    assert [locate_step(CONFIG, step) for step in (0, 2, 3, 6, 7)] == [
        (0, 0),
        (0, 2),
        (2, 0),
        (2, 3),
        (3, 0),
    ]


def test_no_sample_occurs_twice() -> None:
    samples = [
        (d.seed, i)
        for step in range(CONFIG.steps)
        for d in [samples_of_step(CONFIG, step)]
        for i in d[2]
    ]
    assert (
        len(samples)
        == len(set(samples))
        == sum(s.steps * s.global_batch_size for s in CONFIG.stages)
    )


@pytest.mark.parametrize("world_size", [1, 2, 4, 5])
def test_ranks_share_the_samples_of_a_step(world_size: int) -> None:
    for step in range(CONFIG.steps):
        whole = samples_of_step(CONFIG, step)
        parts = [
            samples_of_step(CONFIG, step, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert sorted(i for part in parts for i in part.indices) == list(whole.indices)


def test_seeking_a_distant_step_is_arithmetic() -> None:
    config = override(CONFIG, ["stages.3.steps=100000000"])
    assert samples_of_step(config, 10_000_000).indices.start == (10_000_000 - 7) * 16


def create_plan(num_bins: int, group_size: int = 4) -> BinPlan:
    """Create a plan with one sample in each bin, all of different cost."""
    cost = np.arange(num_bins, dtype=float)
    return pack_bins(
        np.full(num_bins, 8), cost, entries=np.arange(num_bins), max_tokens=8, group_size=group_size
    )


@pytest.mark.parametrize(("num_bins", "bins_per_step"), [(24, 8), (20, 8), (8, 8), (4, 12)])
def test_every_bin_occurs_once_per_epoch(num_bins: int, bins_per_step: int) -> None:
    plan = create_plan(num_bins)
    steps = [bins_of_step(plan, step, num_bins=bins_per_step, seed=3) for step in range(30)]
    assert all(len(step) == bins_per_step for step in steps)
    assert all((np.diff(step) >= 0).all() for step in steps)  # most expensive first
    counts = np.bincount(np.concatenate(steps), minlength=num_bins)
    assert counts.max() - counts.min() <= 1


def test_the_order_differs_by_epoch_and_seed() -> None:
    plan = create_plan(40)
    one, two, other = (
        [bins_of_step(plan, step, num_bins=4, seed=s).tolist() for step in steps]
        for steps, s in ((range(10), 0), (range(10, 20), 0), (range(10), 1))
    )
    assert sorted(one) == sorted(two) == sorted(other)
    assert one != two and one != other


def test_groups_of_similar_cost_stay_together() -> None:
    for step in range(10):
        numbers = bins_of_step(create_plan(40), step, num_bins=4, seed=0)
        assert numbers.tolist() == list(range(numbers[0], numbers[0] + 4))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_ranks_share_the_bins_of_a_step_evenly(world_size: int, num_microbatches: int) -> None:
    numbers = np.arange(16)
    parts = [
        [
            bins_of_rank(
                numbers,
                rank=r,
                world_size=world_size,
                microbatch=t,
                num_microbatches=num_microbatches,
            )
            for r in range(world_size)
        ]
        for t in range(num_microbatches)
    ]
    assert sorted(n for ranks in parts for bins in ranks for n in bins.tolist()) == list(range(16))
    for ranks in parts:
        sums = [bins.sum() for bins in ranks]
        assert max(sums) - min(sums) < world_size  # the order of ranks alternates


def test_seeking_step_one_million_is_fast() -> None:
    plan = create_plan(240_000, group_size=8)
    start = time.perf_counter()
    bins_of_step(plan, 1_000_000, num_bins=8, seed=0)
    assert time.perf_counter() - start < 1
