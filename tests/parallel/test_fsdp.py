"""N processes against one on the union of what they see: loss, every gradient, parameters.

All in float64 unless said otherwise, so that what differs beyond rounding is a fault. Ranks see
unequal shares: text, pictures or a clip alone, nothing at all, pictures nothing is asked about.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen2vl.recipes.nano import ANSWER, SEE
from qwen2vl.train.config import OptimConfig
from tests.parallel import jobs
from tests.parallel.gang import Gang
from tests.parallel.jobs import MIXED, NOTHING, PICTURES, TEXT, VIDEO, Case, Result

ADAMW = OptimConfig(method="adamw", lr=1e-2, eps=1e-3, warmup=1, weight_decay=0.1)
SGD = OptimConfig(method="sgd", lr=1e-2, warmup=1)
MUON = OptimConfig(method="muon", lr=1e-2, eps=1e-3, warmup=1, weight_decay=0.1)

UNASKED = (-1, -3)  # a picture and a clip without a supervised token

# One batch a rank and step.
TWO = (
    ((TEXT,), (PICTURES,)),
    ((VIDEO,), (NOTHING,)),
    ((MIXED,), (UNASKED,)),
)
FOUR = (
    ((TEXT,), (PICTURES,), (VIDEO,), (NOTHING,)),
    ((MIXED,), (TEXT,), (UNASKED,), (PICTURES,)),
    ((NOTHING,), (VIDEO,), (TEXT,), (MIXED,)),
)
# Two batches a rank and step, with media in only one of them.
TWICE = (
    ((TEXT, PICTURES), (NOTHING, VIDEO)),
    ((MIXED, TEXT), (TEXT, NOTHING)),
    ((NOTHING, UNASKED), (VIDEO, TEXT)),
)

CASES = {
    "2 ranks, adamw": Case(shares=TWO, optim=ADAMW),
    "2 ranks, accumulating, sgd": Case(shares=TWICE, optim=SGD),
    "2 ranks, an untied head, kept gathered": Case(
        shares=TWO, optim=SGD, tied=False, reshard=False
    ),
    "4 ranks, sgd": Case(shares=FOUR, optim=SGD),
    "2 copies of 2, adamw": Case(shares=FOUR, optim=ADAMW, replicate=2),
    "2 copies of 2, accumulating": Case(
        shares=tuple((*step, *reversed(step)) for step in TWICE), optim=SGD, replicate=2
    ),
    "2 copies of 1": Case(shares=TWO, optim=SGD, replicate=2),
    "stage 1, the frozen sharded": Case(shares=TWO, optim=ADAMW, rules=SEE),
    "stage 1, the frozen whole": Case(shares=TWO, optim=ADAMW, rules=SEE, frozen="replicate"),
    "stage 3, the frozen whole": Case(shares=TWO, optim=ADAMW, rules=ANSWER, frozen="replicate"),
    "computed again": Case(shares=TWO, optim=ADAMW, visual="block", text="selective"),
}

# The rest shows the same, with more patience.
SLOW = {
    "2 ranks, an untied head, kept gathered",
    "4 ranks, sgd",
    "2 copies of 2, accumulating",
    "2 copies of 1",
    "stage 1, the frozen sharded",
    "stage 1, the frozen whole",
}
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]


def relative(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Find the largest difference of any tensor, relative to its largest number."""
    assert given.keys() == wanted.keys()
    return max(
        float((given[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-12))
        for name in wanted
    )


def run_both(gang: Gang, case: Case) -> tuple[list[Result], Result]:
    return gang.run(case.size, jobs.steps, case), jobs.one_process(case)


@pytest.mark.parametrize("name", NAMES)
def test_many_processes_compute_what_one_does(gang: Gang, name: str) -> None:
    results, one = run_both(gang, CASES[name])
    assert relative(results[0].gradients, one.gradients) < 1e-10
    assert relative(results[0].parameters, one.parameters) < 1e-10
    assert relative(results[0].moments, one.moments) < 1e-10
    for result in results:
        assert result.losses == pytest.approx(one.losses, rel=1e-10)
        assert result.norms == pytest.approx(one.norms, rel=1e-10)
        # Another order, or another number of them, is a hang on a larger machine.
        assert result.collectives == results[0].collectives


def test_float32_agrees_to_its_own_rounding(gang: Gang) -> None:
    results, one = run_both(gang, Case(shares=TWO, optim=ADAMW, dtype="float32"))
    assert relative(results[0].gradients, one.gradients) < 1e-5
    assert relative(results[0].parameters, one.parameters) < 1e-5
    assert results[0].losses == pytest.approx(one.losses, rel=1e-5)


@pytest.mark.parametrize(
    "case",
    [Case(shares=TWO), pytest.param(Case(shares=FOUR, replicate=2), marks=pytest.mark.slow)],
    ids=["2", "4"],
)
def test_muon_on_parts_is_muon(gang: Gang, case: Case) -> None:
    results, one = run_both(gang, replace(case, optim=MUON))
    assert relative(results[0].gradients, one.gradients) < 1e-10
    assert relative(results[0].parameters, one.parameters) < 1e-2
    assert relative(results[0].moments, one.moments) < 1e-2


def test_gathered_in_bfloat16_gradients_are_summed_in_float32(gang: Gang) -> None:
    case = Case(shares=TWO, optim=SGD, dtype="bfloat16")
    (first, _), one = run_both(gang, case)
    assert all(gradient.dtype == torch.float32 for gradient in first.gradients.values())
    assert first.losses[0] == pytest.approx(one.losses[0], rel=2e-2)
    together = torch.cat([g.flatten() for g in first.gradients.values()])
    wanted = torch.cat([g.flatten() for g in one.gradients.values()])
    assert torch.nn.functional.cosine_similarity(together, wanted, dim=0) > 0.99


def test_what_is_computed_again_has_the_same_bits(gang: Gang) -> None:
    plain = Case(shares=TWO, optim=ADAMW, dtype="float32")
    kept = gang.run(2, jobs.steps, plain)[0]
    again = gang.run(2, jobs.steps, replace(plain, visual="selective", text="block"))[0]
    for name, tensor in kept.parameters.items():
        assert torch.equal(tensor, again.parameters[name]), name


def test_the_frozen_whole_are_not_gathered(gang: Gang) -> None:
    case = CASES["stage 3, the frozen whole"]
    whole = gang.run(2, jobs.steps, case)[0].collectives
    sharded = gang.run(2, jobs.steps, replace(case, frozen="shard"))[0].collectives

    def gathers(collectives: list[str]) -> int:
        return sum("allgather" in line for line in collectives)

    assert gathers(whole) < gathers(sharded)
