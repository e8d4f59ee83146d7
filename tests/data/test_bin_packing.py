"""Bin packing: every entry once, within both capacities, full and balanced; seeded permutations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.data.bin_packing import pack_bins, seeded_permutation
from qwen2vl.errors import ConfigError

MAX_TOKENS = 512


def random_sizes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A third of the samples is text only; images cost more than their tokens."""
    rng = np.random.default_rng(seed)
    text = np.minimum(np.rint(rng.lognormal(3, 0.8, count)), 200).astype(np.int64) + 1
    vision_tokens = rng.integers(4, 200, count) * (rng.random(count) > 0.33)
    return text + vision_tokens, 4.0 * vision_tokens * (1 + vision_tokens / 300)


@given(
    st.lists(st.tuples(st.integers(0, MAX_TOKENS), st.integers(0, 900)), min_size=4, max_size=80),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 3),
)
def test_every_entry_is_packed_once_within_both_capacities(
    samples: list[tuple[int, int]], group: int, seed: int
) -> None:
    samples += [(1, 0)]  # a dataset without a good sample is refused before packing
    tokens, vision = (np.array(column) for column in zip(*samples, strict=True))
    entries = np.arange(len(tokens))
    plan = pack_bins(
        tokens,
        vision.astype(float),
        entries=entries,
        max_tokens=MAX_TOKENS,
        max_vision_cost=1000,
        group_size=group,
        seed=seed,
    )
    assert sorted(plan.entries.tolist()) == entries.tolist()
    assert len(plan) % group == 0
    if len(entries) >= len(plan):
        assert np.diff(plan.starts).min() > 0  # no empty bin while another could be split
    for number in range(len(plan)):
        members = plan.members(number)
        assert tokens[members].sum() == plan.tokens[number] <= MAX_TOKENS
        assert vision[members].sum() == pytest.approx(plan.vision[number])
        assert plan.vision[number] <= 1000
    assert (np.diff(plan.vision) <= 1e-9).all()


def test_bins_are_full_and_balanced() -> None:
    tokens, vision = random_sizes(20_000)
    plan = pack_bins(tokens, vision, entries=np.arange(20_000), max_tokens=4 * MAX_TOKENS)
    assert plan.fill_ratio(4 * MAX_TOKENS) > 0.985
    assert plan.imbalance(8) < 1.01
    typical = plan.vision[len(plan) // 20 : -len(plan) // 20]
    assert typical.max() / typical.mean() < 1.25  # balanced by packing, not by sorting


def test_a_vision_capacity_adds_few_bins() -> None:
    tokens, vision = random_sizes(5_000)
    loose = pack_bins(tokens, vision, entries=np.arange(5_000), max_tokens=MAX_TOKENS)
    limit = float(1.1 * loose.vision.mean())
    fitting = np.flatnonzero(vision <= limit)
    tight = pack_bins(tokens, vision, entries=fitting, max_tokens=MAX_TOKENS, max_vision_cost=limit)
    assert tight.vision.max() <= limit
    assert tight.fill_ratio(MAX_TOKENS) > 0.9


def test_samples_over_half_a_bin_get_a_bin_each() -> None:
    tokens = np.full(100, MAX_TOKENS // 2 + 1)
    plan = pack_bins(
        tokens, np.zeros(100), entries=np.arange(100), max_tokens=MAX_TOKENS, group_size=1
    )
    assert len(plan) == 100


def test_an_entry_may_occur_several_times() -> None:
    tokens, vision = random_sizes(50)
    entries = np.array([*range(50), 7, 7, 9])
    plan = pack_bins(tokens, vision, entries=entries, max_tokens=MAX_TOKENS, group_size=2)
    assert sorted(plan.entries.tolist()) == sorted(entries.tolist())


def test_packing_is_a_pure_function_of_its_arguments() -> None:
    tokens, vision = random_sizes(500)
    plans = [
        pack_bins(tokens, vision, entries=np.arange(500), max_tokens=MAX_TOKENS, seed=s)
        for s in (1, 1, 2)
    ]
    assert np.array_equal(plans[0].entries, plans[1].entries)
    assert not np.array_equal(plans[0].entries, plans[2].entries)


def test_bins_are_empty_if_there_are_too_few_samples() -> None:
    plan = pack_bins(np.ones(3), np.zeros(3), entries=np.arange(3), max_tokens=MAX_TOKENS)
    assert len(plan) == 8
    assert [len(plan.members(number)) for number in range(8)] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_a_sample_larger_than_a_bin_is_refused() -> None:
    with pytest.raises(ConfigError, match="larger than a bin"):
        pack_bins(
            np.array([MAX_TOKENS + 1]),
            np.zeros(1),
            entries=np.arange(1),
            max_tokens=MAX_TOKENS,
            group_size=1,
        )


def test_seeded_permutations_are_reproducible() -> None:
    assert seeded_permutation(10, "pass", 0, 0).tolist() == [6, 4, 7, 0, 9, 5, 3, 2, 1, 8]
    assert sorted(seeded_permutation(1000, "x").tolist()) == list(range(1000))
    assert seeded_permutation(1000, "x").tolist() != seeded_permutation(1000, "y").tolist()
