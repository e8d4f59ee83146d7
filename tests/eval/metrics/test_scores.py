"""Scores of sets: means, groups, parse rate, empty sets, and the order of items."""

from __future__ import annotations

from math import isnan

from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.eval.metrics.scores import ItemScore, summarize

ITEMS = st.lists(
    st.builds(
        ItemScore,
        value=st.floats(0, 1),
        is_parsed=st.booleans(),
        group=st.sampled_from("abc"),
    ),
    min_size=1,
    max_size=12,
)


def test_groups_may_weigh_the_same() -> None:
    items = [ItemScore(value=1, group="a")] * 3 + [ItemScore(value=0, group="b", is_parsed=False)]
    over_items, over_groups = summarize(items), summarize(items, over="groups")
    assert (over_items.value, over_groups.value) == (0.75, 0.5)
    assert over_items.groups == {"a": 1, "b": 0}
    assert over_items.parse_rate == 0.75
    assert over_items.count == 4
    low, high = over_items.interval
    assert low < 0.75 < high < 1


def test_an_empty_set_has_no_score() -> None:
    for over in ("items", "groups"):
        empty = summarize([], over=over)
        assert isnan(empty.value) and isnan(empty.parse_rate) and isnan(empty.interval[0])
        assert (empty.count, empty.groups) == (0, {})


@given(ITEMS, st.randoms(use_true_random=False))
def test_the_order_of_items_has_no_effect(items: list[ItemScore], random: object) -> None:
    shuffled = list(items)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert summarize(items) == summarize(shuffled)
    assert summarize(items, over="groups") == summarize(shuffled, over="groups")
