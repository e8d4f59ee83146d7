"""The schedule is a pure function: no sample twice, and ranks share a step."""

import time

import numpy as np
import pytest

from qwen2vl.data.packing import Plan, plan_bins
from qwen2vl.recipes import tiny
from qwen2vl.train.config import override
from qwen2vl.train.loader.data_order import bins_of, deal, draw, locate

CONFIG = override(tiny.recipe(), ["stages.0.steps=3", "stages.1.steps=0", "stages.2.steps=4"])


def test_locate_walks_through_the_stages_and_skips_an_empty_one() -> None:
    assert [locate(CONFIG, step) for step in (0, 2, 3, 6, 7)] == [
        (0, 0),
        (0, 2),
        (2, 0),
        (2, 3),
        (3, 0),
    ]


def test_no_sample_comes_twice() -> None:
    seen = [(d.seed, i) for step in range(CONFIG.steps) for d in [draw(CONFIG, step)] for i in d[2]]
    assert len(seen) == len(set(seen)) == sum(s.steps * s.examples for s in CONFIG.stages)


@pytest.mark.parametrize("ranks", [1, 2, 4, 5])
def test_ranks_share_the_samples_of_a_step(ranks: int) -> None:
    for step in range(CONFIG.steps):
        whole = draw(CONFIG, step)
        parts = [draw(CONFIG, step, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert sorted(i for part in parts for i in part.indices) == list(whole.indices)


def test_seeking_far_is_arithmetic() -> None:
    config = override(CONFIG, ["stages.3.steps=100000000"])
    assert draw(config, 10_000_000).indices.start == (10_000_000 - 7) * 16


def plan_of(bins: int, group: int = 4) -> Plan:
    """Make bins of one sample each, all of different cost."""
    cost = np.arange(bins, dtype=float)
    return plan_bins(np.full(bins, 8), cost, entries=np.arange(bins), max_tokens=8, group=group)


@pytest.mark.parametrize(("bins", "per_step"), [(24, 8), (20, 8), (8, 8), (4, 12)])
def test_every_bin_comes_once_in_a_pass_wherever_steps_begin(bins: int, per_step: int) -> None:
    plan = plan_of(bins)
    steps = [bins_of(plan, step, bins=per_step, seed=3) for step in range(30)]
    assert all(len(step) == per_step for step in steps)
    assert all((np.diff(step) >= 0).all() for step in steps)  # dearest first
    seen = np.bincount(np.concatenate(steps), minlength=bins)
    assert seen.max() - seen.min() <= 1


def test_passes_differ_in_their_order_and_seeds_too() -> None:
    plan = plan_of(40)
    one, two, other = (
        [bins_of(plan, step, bins=4, seed=s).tolist() for step in steps]
        for steps, s in ((range(10), 0), (range(10, 20), 0), (range(10), 1))
    )
    assert sorted(one) == sorted(two) == sorted(other)
    assert one != two and one != other


def test_groups_of_like_cost_stay_together() -> None:
    for step in range(10):
        numbers = bins_of(plan_of(40), step, bins=4, seed=0)
        assert numbers.tolist() == list(range(numbers[0], numbers[0] + 4))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("turns", [1, 2])
def test_ranks_share_the_bins_of_a_step_evenly(ranks: int, turns: int) -> None:
    numbers = np.arange(16)
    parts = [
        [deal(numbers, rank=r, ranks=ranks, turn=t, turns=turns) for r in range(ranks)]
        for t in range(turns)
    ]
    assert sorted(n for turn in parts for own in turn for n in own.tolist()) == list(range(16))
    for turn in parts:
        sums = [own.sum() for own in turn]
        assert max(sums) - min(sums) < ranks  # who had the dearest of one round gets the cheapest


def test_seeking_step_one_million_takes_no_time() -> None:
    plan = plan_of(240_000, group=8)
    began = time.perf_counter()
    bins_of(plan, 1_000_000, bins=8, seed=0)
    assert time.perf_counter() - began < 1
