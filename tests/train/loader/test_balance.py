"""Load balancing: shares are complete, disjoint and about equal, for any number of ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.flops import BatchCounts, inference_flop_counter
from qwen2vl.synth import Mixture, render, sample
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.loader.balance import (
    MAX_GROUP_SIZE,
    balanced_share,
    estimate_flops,
    rank_group,
)
from tests.requirements import needs_training_fonts
from tests.tiny import tiny_config, tiny_processor
from tests.train.loader.test_dataloader import samples_of_steps

MIXTURE = Mixture(weights={"shapes": 1.0, "motion": 0.3, "two_pictures": 0.3, "text_only": 0.2})
CONFIG = TrainConfig(
    name="balance",
    model=tiny_config(),
    num_workers=0,
    stages=(Stage(name="a", steps=2, global_batch_size=12, mixture=MIXTURE),),
)


@given(
    costs=st.lists(st.floats(0, 1e15, allow_subnormal=False), max_size=60),
    num_ranks=st.integers(1, MAX_GROUP_SIZE),
)
def test_shares_are_complete_disjoint_and_within_the_bound(
    costs: list[float], num_ranks: int
) -> None:
    shares = [balanced_share(costs, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    if len(costs) >= num_ranks and min(costs, default=0) > 0:
        assert all(shares)
    # Graham's bound on the heaviest share, with lower bounds of the optimum.
    optimum = max([sum(costs) / num_ranks, *costs])
    heaviest = max(sum(costs[i] for i in share) for share in shares)
    assert heaviest <= 2 * optimum * (1 + 1e-9)


def test_one_large_sample_has_a_rank_of_its_own() -> None:
    costs = [1.0] * 7 + [100.0]
    assert balanced_share(costs, 0, 2) == [7]
    assert balanced_share(costs, 1, 2) == list(range(7))


@given(world_size=st.integers(1, 200))
def test_groups_cover_all_ranks(world_size: int) -> None:
    groups = [rank_group(rank, world_size) for rank in range(world_size)]
    places = [(group.number, group.rank) for group in groups]
    size, num_groups = groups[0].size, groups[0].num_groups
    assert size * num_groups == world_size
    assert size <= MAX_GROUP_SIZE
    assert places == [(n, r) for n in range(num_groups) for r in range(size)]


@needs_training_fonts
def test_the_estimate_is_close_to_the_flops_of_the_rendered_sample() -> None:
    processor = tiny_processor()
    counter = inference_flop_counter(processor.config)
    for index in range(30):
        spec = sample(3, index, MIXTURE)
        model_input = processor(render(spec).messages, for_training=True)
        frames = [grid.h * grid.w for grid in model_input.grids for _ in range(grid.t)]
        exact = counter.count(BatchCounts.from_lengths(frames, [len(model_input.input_ids)]))
        estimate = estimate_flops(spec, processor)
        # Without the chat template's tokens, some dozen.
        template = counter.count(BatchCounts.from_lengths([], [60 + 12 * len(spec.questions)]))
        assert estimate <= exact.model <= 1.2 * estimate + 4 * template.model


@needs_training_fonts
@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 3), (2, 2), (11, 1)])
def test_a_synthetic_step_has_the_same_samples_on_any_number_of_ranks(
    world_size: int, accumulation: int
) -> None:
    config = replace(CONFIG, gradient_accumulation_steps=accumulation)
    assert samples_of_steps(config, world_size) == samples_of_steps(CONFIG, 1)
