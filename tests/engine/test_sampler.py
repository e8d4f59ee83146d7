"""The sampler beside transformers' processors, on random logits; seeds; what NaN does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2vl.engine.params import SamplingParams
from qwen2vl.engine.sampler import Rule, Sampler, keep_top_k, keep_top_p, penalise_repetition
from qwen2vl.errors import EngineError
from qwen2vl.weights import GenerationDefaults

CPU = torch.device("cpu")
OFFICIAL = GenerationDefaults(
    do_sample=True, temperature=0.01, top_p=0.001, top_k=1, repetition_penalty=1.0
)


def logits(seed: int, size: int = 50) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 4


def rule(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, penalty: float = 1.0
) -> Rule:
    return Rule(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)


def sampler(rule: Rule, seed: int | None = 0, prompt: list[int] | None = None) -> Sampler:
    return Sampler(rule, prompt or [], vocab_size=50, device=CPU, seed=seed)


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.01, 5),
    top_k=st.integers(1, 70),
    top_p=st.floats(0.001, 0.999),
    penalty=st.floats(0.3, 3),
    seen=st.lists(st.integers(0, 49), min_size=1, max_size=20),
)
@settings(max_examples=200)
def test_scores_equal_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float, seen: list[int]
) -> None:
    scores_V = logits(seed)
    reference = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty),
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
        ]
    )
    want_V = reference(torch.tensor([seen]), scores_V[None].clone())[0]
    seen_V = torch.zeros(50, dtype=torch.bool)
    seen_V[seen] = True
    got_V = penalise_repetition(scores_V, seen_V, penalty) / temperature
    got_V = keep_top_p(keep_top_k(got_V, top_k), top_p)
    assert torch.equal(got_V, want_V)


def test_ties_at_the_kth_place_all_stay() -> None:
    kept_V = keep_top_k(torch.tensor([1.0, 2.0, 2.0, 0.0]), 1)
    assert kept_V.isfinite().tolist() == [False, True, True, False]


def test_the_best_token_survives_the_smallest_top_p() -> None:
    kept_V = keep_top_p(logits(3), 1e-9)
    assert kept_V.isfinite().nonzero().flatten().tolist() == [logits(3).argmax().item()]


def test_temperature_zero_is_the_largest_score() -> None:
    assert sampler(rule(temperature=0.0)).sample(logits(1))[0] == logits(1).argmax().item()


def test_the_penalty_counts_prompt_and_answer() -> None:
    scores_V = torch.zeros(50)
    scores_V[7], scores_V[8], scores_V[9] = 3.0, 2.9, 2.8
    chooser = sampler(rule(temperature=0.0, penalty=2.0), prompt=[7])
    assert [chooser.sample(scores_V)[0] for _ in range(3)] == [8, 9, 7]


def test_draws_follow_the_odds() -> None:
    scores_V = torch.tensor([0.5, 0.3, 0.2]).log()
    chooser = Sampler(rule(), [], vocab_size=3, device=CPU, seed=1)
    counts = torch.zeros(3)
    for _ in range(3000):
        counts[chooser.sample(scores_V)[0]] += 1
    assert torch.allclose(counts / 3000, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


def test_the_same_seed_draws_the_same() -> None:
    one, same, other = (
        [chooser.sample(logits(i))[0] for i in range(40)]
        for chooser in (sampler(rule(), 5), sampler(rule(), 5), sampler(rule(), 6))
    )
    assert one == same
    assert one != other


def test_without_a_seed_draws_differ() -> None:
    one, two = (
        [chooser.sample(logits(i))[0] for i in range(40)]
        for chooser in (sampler(rule(), None), sampler(rule(), None))
    )
    assert one != two


def test_seeds_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(9)
    want = torch.rand(3)
    torch.manual_seed(9)
    sampler(rule(), 5).sample(logits(0))
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_allowed_seed_works(seed: int) -> None:
    sampler(rule(), seed).sample(logits(0))


def test_logprobs_are_of_the_model_not_of_the_cuts() -> None:
    chooser = Sampler(
        rule(temperature=0.5, top_k=1), [], vocab_size=50, device=CPU, seed=0, num_logprobs=3
    )
    token, report = chooser.sample(logits(2))
    want_V = logits(2).log_softmax(-1)
    assert report is not None
    assert report.token_id == token
    assert math.isclose(report.logprob, want_V[token].item())
    assert [i for i, _ in report.top] == want_V.topk(3).indices.tolist()


def test_logprobs_zero_reports_the_chosen_token_alone() -> None:
    chooser = Sampler(rule(0.0), [], vocab_size=50, device=CPU, num_logprobs=0)
    _, report = chooser.sample(logits(2))
    assert report is not None
    assert report.top == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_named(bad: float) -> None:
    scores_V = logits(0)
    scores_V[4] = bad
    with pytest.raises(EngineError, match=r"not finite.*doctor --check-weights"):
        sampler(rule(temperature=0.0)).sample(scores_V)


def test_half_precision_logits_are_widened_first() -> None:
    scores_V = torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16)
    chooser = Sampler(rule(0.01), [], vocab_size=3, device=CPU, seed=0, num_logprobs=3)
    _, report = chooser.sample(scores_V)
    assert report is not None
    assert math.isclose(sum(math.exp(p) for _, p in report.top), 1.0, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("params", "defaults", "want"),
    [
        ({}, GenerationDefaults(), rule(0.0, 50)),
        ({}, GenerationDefaults(temperature=0.7), rule(0.0, 50)),
        ({}, GenerationDefaults(do_sample=True), rule(1.0, 50)),
        ({}, OFFICIAL, rule(0.01, 1, 0.001)),
        ({"temperature": 0}, OFFICIAL, rule(0.0, 1, 0.001)),
        ({"temperature": 0.7}, GenerationDefaults(), rule(0.7, 50)),
        ({"temperature": 0.7, "top_k": 0, "top_p": 1.0}, OFFICIAL, rule(0.7, 0, 1.0)),
        ({"repetition_penalty": 1.2}, OFFICIAL, rule(0.01, 1, 0.001, 1.2)),
    ],
)
def test_open_fields_take_the_checkpoints_habits(
    params: dict[str, float], defaults: GenerationDefaults, want: Rule
) -> None:
    assert Rule.resolve(SamplingParams(**params), defaults) == want  # type: ignore[arg-type]
