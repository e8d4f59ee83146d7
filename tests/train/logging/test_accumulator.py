"""Sums between reports: one vector, addable over ranks; what lines say of it is in test_metrics."""

from __future__ import annotations

import pytest
import torch

from qwen2vl.data.preprocess import BadSample
from qwen2vl.train.flops import Flops
from qwen2vl.train.loader.batch import Batch, pack
from qwen2vl.train.logging.accumulator import COUNTS, Tally, read
from qwen2vl.train.logging.step_timer import PHASES
from qwen2vl.train.loss import Outcome
from tests.train.loader.test_batch import conversations

SECONDS = {phase: float(i) for i, phase in enumerate(PHASES)}
BAD = (BadSample("a", "rows", "missing", "gone"),)


def add(tally: Tally, batch: Batch, *, norm: float = 2.0, waited: float = 0.5) -> None:
    rows = len(batch.targets_R)
    losses_R = torch.arange(1.0, 1.0 + rows)
    right_R = torch.arange(rows) % 2 == 0
    outcome = Outcome(losses_R.sum(), losses_R, right_R)
    tally.add(batch, outcome, torch.tensor(norm), waited, Flops(100, 7))


def test_a_vector_says_what_was_added() -> None:
    tally, batch = Tally(), pack(conversations()[:3], pad_id=0, bad=BAD)
    add(tally, batch)
    assert tally.families == ["family0", "family1"]
    found = read(tally.vector(tally.families, SECONDS), tally.families)
    assert found.counts == {
        "batches": 1,
        "norm": 2.0,
        "examples": 3,
        "tokens": len(batch.input_ids_T),
        "patches": len(batch.patches_NP),
        "pictures": 3,
        "bad": 1,
        "model": 100,
        "again": 7,
    }
    assert sum(row["targets"] for row in found.families.values()) == len(batch.targets_R)
    assert sum(row["answers"] for row in found.families.values()) == 3
    (own,) = found.ranks
    assert own == {"waited": 0.5, **SECONDS, "operations": 107.0}


def test_a_null_item_counts_as_no_picture_and_an_empty_batch_as_no_family() -> None:
    tally = Tally()
    add(tally, pack(conversations()[:1], pad_id=0))
    add(tally, pack([], pad_id=0, bad=BAD))
    found = read(tally.vector(["family0", "unseen"], SECONDS), ["family0", "unseen"])
    assert (found.counts["patches"], found.counts["pictures"], found.counts["bad"]) == (0, 0, 1)
    assert list(found.families) == ["family0"]


def test_vectors_of_ranks_add_up_to_a_table_of_all() -> None:
    families, total = ["family0", "family1"], torch.zeros(1)
    for rank in range(3):
        tally = Tally()
        for _ in range(rank):
            add(tally, pack(conversations()[:2], pad_id=0), norm=1.0 + rank, waited=rank)
        total = total + tally.vector(families, SECONDS, rank, 3)
    found = read(total, families, 3)
    assert found.counts["batches"] == 3
    assert found.counts["norm"] == 2.0 + 3.0 * 2
    assert [row["waited"] for row in found.ranks] == [0.0, 1.0, 4.0]
    assert [row["operations"] for row in found.ranks] == [0.0, 107.0, 214.0]
    assert all(row["forward"] == SECONDS["forward"] for row in found.ranks)


def test_a_vector_of_nothing_is_zeros_but_for_the_clock() -> None:
    vector = Tally().vector(["a"], dict.fromkeys(PHASES, 0.0))
    assert not vector.any() and vector.dtype == torch.float64
    assert len(vector) == len(COUNTS) + 5 + len(PHASES) + 2


def test_a_family_that_was_not_promised_is_a_bug() -> None:
    tally = Tally()
    add(tally, pack(conversations()[:2], pad_id=0))
    with pytest.raises(KeyError):
        tally.vector(["family0"], SECONDS)
