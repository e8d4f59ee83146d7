"""The schedule is a pure function: no sample twice, and ranks share a step."""

import pytest

from qwen2vl.recipes import tiny
from qwen2vl.train.config import override
from qwen2vl.train.schedule import draw, locate

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
