"""MetricAccumulator: one vector, additive over ranks; records are tested in test_metrics.py."""

from __future__ import annotations

import pytest
import torch

from qwen2vl.data.preprocess import BadSample
from qwen2vl.flops import Flops
from qwen2vl.train.loader.batch import Batch, pack_batch
from qwen2vl.train.logging.accumulator import COUNTS, MetricAccumulator, unpack_sums
from qwen2vl.train.logging.step_timer import PHASES
from qwen2vl.train.loss import LossOutput
from tests.train.loader.test_batch import conversations

SECONDS = {phase: float(i) for i, phase in enumerate(PHASES)}
BAD = (BadSample("a", "rows", "missing", "gone"),)


def add_batch(
    accumulator: MetricAccumulator, batch: Batch, *, grad_norm: float = 2.0, data_wait: float = 0.5
) -> None:
    rows = len(batch.targets_R)
    losses_R = torch.arange(1.0, 1.0 + rows)
    is_correct_R = torch.arange(rows) % 2 == 0
    output = LossOutput(losses_R.sum(), losses_R, is_correct_R)
    accumulator.add(batch, output, torch.tensor(grad_norm), data_wait, Flops(100, 7))


def test_a_vector_has_the_sums_of_all_batches() -> None:
    accumulator, batch = (
        MetricAccumulator(),
        pack_batch(conversations()[:3], pad_id=0, bad_samples=BAD),
    )
    add_batch(accumulator, batch)
    assert accumulator.families == ["family0", "family1"]
    sums = unpack_sums(accumulator.to_vector(accumulator.families, SECONDS), accumulator.families)
    assert sums.counts == {
        "batches": 1,
        "grad_norm": 2.0,
        "examples": 3,
        "tokens": len(batch.input_ids_T),
        "patches": len(batch.patches_NP),
        "images": 3,
        "bad": 1,
        "model_flops": 100,
        "recompute_flops": 7,
    }
    assert sum(row["targets"] for row in sums.families.values()) == len(batch.targets_R)
    assert sum(row["examples"] for row in sums.families.values()) == 3
    (rank_sums,) = sums.ranks
    assert rank_sums == {"data_wait": 0.5, **SECONDS, "flops": 107.0}


def test_dummy_images_and_empty_batches_are_not_counted() -> None:
    accumulator = MetricAccumulator()
    add_batch(accumulator, pack_batch(conversations()[:1], pad_id=0))
    add_batch(accumulator, pack_batch([], pad_id=0, bad_samples=BAD))
    sums = unpack_sums(accumulator.to_vector(["family0", "unseen"], SECONDS), ["family0", "unseen"])
    assert (sums.counts["patches"], sums.counts["images"], sums.counts["bad"]) == (0, 0, 1)
    assert list(sums.families) == ["family0"]


def test_vectors_of_ranks_add_up_to_a_table_of_all_ranks() -> None:
    families, total = ["family0", "family1"], torch.zeros(1)
    for rank in range(3):
        accumulator = MetricAccumulator()
        for _ in range(rank):
            add_batch(
                accumulator,
                pack_batch(conversations()[:2], pad_id=0),
                grad_norm=1.0 + rank,
                data_wait=rank,
            )
        total = total + accumulator.to_vector(families, SECONDS, rank, 3)
    sums = unpack_sums(total, families, 3)
    assert sums.counts["batches"] == 3
    assert sums.counts["grad_norm"] == 2.0 + 3.0 * 2
    assert [row["data_wait"] for row in sums.ranks] == [0.0, 1.0, 4.0]
    assert [row["flops"] for row in sums.ranks] == [0.0, 107.0, 214.0]
    assert all(row["forward"] == SECONDS["forward"] for row in sums.ranks)


def test_the_vector_of_a_new_accumulator_is_zero() -> None:
    vector = MetricAccumulator().to_vector(["a"], dict.fromkeys(PHASES, 0.0))
    assert not vector.any() and vector.dtype == torch.float64
    assert len(vector) == len(COUNTS) + 5 + len(PHASES) + 2


def test_an_unlisted_family_is_an_error() -> None:
    accumulator = MetricAccumulator()
    add_batch(accumulator, pack_batch(conversations()[:2], pad_id=0))
    with pytest.raises(KeyError):
        accumulator.to_vector(["family0"], SECONDS)
