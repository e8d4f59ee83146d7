"""Bins: every entry once, both capacities held, full and even; and shuffles that never change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.data.packing import plan_bins, shuffled
from qwen2vl.errors import ConfigError

CAP = 512


def sizes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A third is text alone; pictures cost by more than their tokens."""
    rng = np.random.default_rng(seed)
    text = np.minimum(np.rint(rng.lognormal(3, 0.8, count)), 200).astype(np.int64) + 1
    seen = rng.integers(4, 200, count) * (rng.random(count) > 0.33)
    return text + seen, 4.0 * seen * (1 + seen / 300)


@given(
    st.lists(st.tuples(st.integers(0, CAP), st.integers(0, 900)), min_size=4, max_size=80),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 3),
)
def test_every_entry_comes_once_and_both_capacities_hold(
    samples: list[tuple[int, int]], group: int, seed: int
) -> None:
    samples += [(1, 0)]  # where all are bad there is no plan, and corpus.py says so before
    tokens, vision = (np.array(column) for column in zip(*samples, strict=True))
    entries = np.arange(len(tokens))
    plan = plan_bins(
        tokens,
        vision.astype(float),
        entries=entries,
        max_tokens=CAP,
        max_vision=1000,
        group=group,
        seed=seed,
    )
    assert sorted(plan.entries.tolist()) == entries.tolist()
    assert len(plan) % group == 0
    if len(entries) >= len(plan):
        assert np.diff(plan.starts).min() > 0  # nothing is empty that need not be
    for number in range(len(plan)):
        members = plan.members(number)
        assert tokens[members].sum() == plan.tokens[number] <= CAP
        assert vision[members].sum() == pytest.approx(plan.vision[number])
        assert plan.vision[number] <= 1000
    assert (np.diff(plan.vision) <= 1e-9).all()


def test_bins_are_full_and_cost_the_same() -> None:
    tokens, vision = sizes(20_000)
    plan = plan_bins(tokens, vision, entries=np.arange(20_000), max_tokens=4 * CAP)
    assert plan.fill(4 * CAP) > 0.985
    assert plan.imbalance(8) < 1.01
    typical = plan.vision[len(plan) // 20 : -len(plan) // 20]
    assert typical.max() / typical.mean() < 1.25  # alike by themselves, before any sorting


def test_a_second_capacity_costs_bins_only_where_it_must() -> None:
    tokens, vision = sizes(5_000)
    loose = plan_bins(tokens, vision, entries=np.arange(5_000), max_tokens=CAP)
    limit = float(1.1 * loose.vision.mean())
    keep = np.flatnonzero(vision <= limit)
    tight = plan_bins(tokens, vision, entries=keep, max_tokens=CAP, max_vision=limit)
    assert tight.vision.max() <= limit
    assert tight.fill(CAP) > 0.9


def test_samples_that_fit_only_one_to_a_bin_get_one_each() -> None:
    tokens = np.full(100, CAP // 2 + 1)
    plan = plan_bins(tokens, np.zeros(100), entries=np.arange(100), max_tokens=CAP, group=1)
    assert len(plan) == 100


def test_a_sample_may_come_several_times() -> None:
    tokens, vision = sizes(50)
    entries = np.array([*range(50), 7, 7, 9])
    plan = plan_bins(tokens, vision, entries=entries, max_tokens=CAP, group=2)
    assert sorted(plan.entries.tolist()) == sorted(entries.tolist())


def test_it_is_a_function_of_its_arguments_and_the_seed_matters() -> None:
    tokens, vision = sizes(500)
    same = [
        plan_bins(tokens, vision, entries=np.arange(500), max_tokens=CAP, seed=s) for s in (1, 1, 2)
    ]
    assert np.array_equal(same[0].entries, same[1].entries)
    assert not np.array_equal(same[0].entries, same[2].entries)


def test_few_samples_leave_bins_empty() -> None:
    plan = plan_bins(np.ones(3), np.zeros(3), entries=np.arange(3), max_tokens=CAP)
    assert len(plan) == 8
    assert [len(plan.members(number)) for number in range(8)] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_a_sample_larger_than_a_bin_is_refused() -> None:
    with pytest.raises(ConfigError, match="larger than a bin"):
        plan_bins(np.array([CAP + 1]), np.zeros(1), entries=np.arange(1), max_tokens=CAP, group=1)


def test_a_shuffle_is_the_same_forever() -> None:
    assert shuffled(10, "pass", 0, 0).tolist() == [6, 4, 7, 0, 9, 5, 3, 2, 1, 8]
    assert sorted(shuffled(1000, "x").tolist()) == list(range(1000))
    assert shuffled(1000, "x").tolist() != shuffled(1000, "y").tolist()
