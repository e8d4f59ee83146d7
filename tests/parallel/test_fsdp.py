"""FSDP on N processes against one process on the union of their data: loss, gradients, parameters.

In float64 unless stated, so that any difference beyond rounding is a bug. The shares of the ranks
are unequal: text, images or a video alone, an empty batch, media without supervised tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen2vl.recipes.nano import TRAIN_DECODER_AND_MERGER, TRAIN_VISION
from qwen2vl.train.config import OptimConfig
from tests.parallel import training_jobs
from tests.parallel.process_pool import ProcessPool
from tests.parallel.training_jobs import EMPTY, IMAGES, MIXED, TEXT, VIDEO, Case, Result

ADAMW = OptimConfig(name="adamw", lr=1e-2, eps=1e-3, warmup_steps=1, weight_decay=0.1)
SGD = OptimConfig(name="sgd", lr=1e-2, warmup_steps=1)
MUON = OptimConfig(name="muon", lr=1e-2, eps=1e-3, warmup_steps=1, weight_decay=0.1)

UNSUPERVISED = (-1, -3)  # an image and a video without supervised tokens

# One batch per rank and step.
TWO = (
    ((TEXT,), (IMAGES,)),
    ((VIDEO,), (EMPTY,)),
    ((MIXED,), (UNSUPERVISED,)),
)
FOUR = (
    ((TEXT,), (IMAGES,), (VIDEO,), (EMPTY,)),
    ((MIXED,), (TEXT,), (UNSUPERVISED,), (IMAGES,)),
    ((EMPTY,), (VIDEO,), (TEXT,), (MIXED,)),
)
# Two batches per rank and step, with media in only one of them.
TWO_ACCUMULATING = (
    ((TEXT, IMAGES), (EMPTY, VIDEO)),
    ((MIXED, TEXT), (TEXT, EMPTY)),
    ((EMPTY, UNSUPERVISED), (VIDEO, TEXT)),
)

CASES = {
    "2 ranks, adamw": Case(shares=TWO, optim=ADAMW),
    "2 ranks, gradient accumulation, sgd": Case(shares=TWO_ACCUMULATING, optim=SGD),
    "2 ranks, untied head, no resharding": Case(
        shares=TWO, optim=SGD, tied=False, reshard_after_forward=False
    ),
    "4 ranks, sgd": Case(shares=FOUR, optim=SGD),
    "2 replicas of 2, adamw": Case(shares=FOUR, optim=ADAMW, dp_replicate=2),
    "2 replicas of 2, gradient accumulation": Case(
        shares=tuple((*step, *reversed(step)) for step in TWO_ACCUMULATING),
        optim=SGD,
        dp_replicate=2,
    ),
    "2 replicas of 1": Case(shares=TWO, optim=SGD, dp_replicate=2),
    "stage 1, frozen sharded": Case(shares=TWO, optim=ADAMW, rules=TRAIN_VISION),
    "stage 1, frozen replicated": Case(
        shares=TWO, optim=ADAMW, rules=TRAIN_VISION, frozen="replicate"
    ),
    "stage 3, frozen replicated": Case(
        shares=TWO, optim=ADAMW, rules=TRAIN_DECODER_AND_MERGER, frozen="replicate"
    ),
    "activation checkpointing": Case(shares=TWO, optim=ADAMW, visual="full", text="selective"),
}

# Slow variants of the same checks.
SLOW = {
    "2 ranks, untied head, no resharding",
    "4 ranks, sgd",
    "2 replicas of 2, gradient accumulation",
    "2 replicas of 1",
    "stage 1, frozen sharded",
    "stage 1, frozen replicated",
}
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]


def max_relative_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of any tensor, relative to its largest element."""
    assert actual.keys() == expected.keys()
    return max(
        float(
            (actual[name] - expected[name]).abs().max()
            / expected[name].abs().max().clamp(min=1e-12)
        )
        for name in expected
    )


def run_both(process_pool: ProcessPool, case: Case) -> tuple[list[Result], Result]:
    return process_pool.run(
        case.world_size, training_jobs.train_sharded, case
    ), training_jobs.train_on_one_process(case)


@pytest.mark.parametrize("name", NAMES)
def test_sharded_training_equals_a_single_process(process_pool: ProcessPool, name: str) -> None:
    results, reference = run_both(process_pool, CASES[name])
    assert max_relative_error(results[0].gradients, reference.gradients) < 1e-10
    assert max_relative_error(results[0].parameters, reference.parameters) < 1e-10
    assert max_relative_error(results[0].optimizer_states, reference.optimizer_states) < 1e-10
    for result in results:
        assert result.losses == pytest.approx(reference.losses, rel=1e-10)
        assert result.grad_norms == pytest.approx(reference.grad_norms, rel=1e-10)
        # A different order or number of collectives would deadlock on real hardware.
        assert result.collectives == results[0].collectives


def test_float32_agrees_within_rounding(process_pool: ProcessPool) -> None:
    results, reference = run_both(process_pool, Case(shares=TWO, optim=ADAMW, dtype="float32"))
    assert max_relative_error(results[0].gradients, reference.gradients) < 1e-5
    assert max_relative_error(results[0].parameters, reference.parameters) < 1e-5
    assert results[0].losses == pytest.approx(reference.losses, rel=1e-5)


@pytest.mark.parametrize(
    "case",
    [Case(shares=TWO), pytest.param(Case(shares=FOUR, dp_replicate=2), marks=pytest.mark.slow)],
    ids=["2", "4"],
)
def test_muon_on_shards_equals_muon_on_full_matrices(process_pool: ProcessPool, case: Case) -> None:
    results, reference = run_both(process_pool, replace(case, optim=MUON))
    assert max_relative_error(results[0].gradients, reference.gradients) < 1e-10
    assert max_relative_error(results[0].parameters, reference.parameters) < 1e-2
    assert max_relative_error(results[0].optimizer_states, reference.optimizer_states) < 1e-2


def test_with_bfloat16_weights_gradients_are_reduced_in_float32(process_pool: ProcessPool) -> None:
    case = Case(shares=TWO, optim=SGD, dtype="bfloat16")
    (first, _), reference = run_both(process_pool, case)
    assert all(gradient.dtype == torch.float32 for gradient in first.gradients.values())
    assert first.losses[0] == pytest.approx(reference.losses[0], rel=2e-2)
    flat = torch.cat([g.flatten() for g in first.gradients.values()])
    expected = torch.cat([g.flatten() for g in reference.gradients.values()])
    assert torch.nn.functional.cosine_similarity(flat, expected, dim=0) > 0.99


def test_activation_checkpointing_gives_the_same_bits(process_pool: ProcessPool) -> None:
    plain = Case(shares=TWO, optim=ADAMW, dtype="float32")
    baseline = process_pool.run(2, training_jobs.train_sharded, plain)[0]
    recomputed = process_pool.run(
        2, training_jobs.train_sharded, replace(plain, visual="selective", text="full")
    )[0]
    for name, tensor in baseline.parameters.items():
        assert torch.equal(tensor, recomputed.parameters[name]), name


def test_replicated_frozen_parameters_are_not_gathered(process_pool: ProcessPool) -> None:
    case = CASES["stage 3, frozen replicated"]
    replicated = process_pool.run(2, training_jobs.train_sharded, case)[0].collectives
    sharded = process_pool.run(2, training_jobs.train_sharded, replace(case, frozen="shard"))[
        0
    ].collectives

    def gathers(collectives: list[str]) -> int:
        return sum("allgather" in line for line in collectives)

    assert gathers(replicated) < gathers(sharded)
