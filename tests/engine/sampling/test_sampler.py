"""The sampler beside transformers' processors, on random logits; seeds; what NaN does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.sampling.sampler import Rule, Sampler, shortlist
from qwen2vl.errors import EngineError, InputError
from qwen2vl.weights import GenerationDefaults

CPU = torch.device("cpu")
OFFICIAL = GenerationDefaults(
    do_sample=True, temperature=0.01, top_p=0.001, top_k=1, repetition_penalty=1.0
)


def logits(seed: int, size: int = 50) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 4


def rule(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, **others: Any) -> Rule:
    return Rule(temperature=temperature, top_k=top_k, top_p=top_p, **others)


def sampler(rule: Rule, seed: int | None = 0, prompt: list[int] | None = None) -> Sampler:
    return Sampler(rule, prompt or [], vocab_size=50, device=CPU, seed=seed)


def odds(chooser: Sampler, logits_V: Tensor) -> Tensor:
    """Spread what may be drawn next over the vocabulary; nothing is drawn."""
    ids_K, weights_K = shortlist(chooser._adjust(logits_V), chooser.rule)
    return torch.zeros(len(logits_V)).index_copy(0, ids_K, weights_K / weights_K.sum())


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.01, 5),
    top_k=st.integers(1, 70),
    top_p=st.floats(0.001, 0.999),
    min_p=st.floats(0.001, 1),
    penalty=st.floats(0.3, 3),
    bias=st.dictionaries(st.integers(0, 49), st.floats(-100, 100), min_size=1, max_size=5),
    seen=st.lists(st.integers(0, 49), min_size=1, max_size=20),
)
@settings(max_examples=300)
def test_the_odds_equal_those_of_transformers(
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    bias: dict[int, float],
    seen: list[int],
) -> None:
    reference = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
            RepetitionPenaltyLogitsProcessor(penalty),
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ]
    )
    want_V = reference(torch.tensor([seen]), logits(seed)[None].clone())[0].softmax(-1)
    ours = rule(
        temperature,
        top_k,
        top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        logit_bias=tuple(bias.items()),
    )
    got_V = odds(sampler(ours, prompt=seen), logits(seed))
    assert torch.equal(got_V > 0, want_V > 0)
    torch.testing.assert_close(got_V, want_V, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_top_p_of_a_whole_vocabulary_equals_transformers(top_p: float, scale: float) -> None:
    scores_V = logits(5, 20_000) * scale
    want_V = TopPLogitsWarper(top_p)(torch.tensor([[]]), scores_V[None])[0].softmax(-1)
    got_V = odds(sampler(rule(top_p=top_p)), scores_V)
    assert (got_V > 0).sum() == pytest.approx((want_V > 0).sum(), abs=1)
    torch.testing.assert_close(got_V, want_V, rtol=2e-3, atol=1e-6)


def test_ties_at_the_kth_place_all_stay() -> None:
    scores_V = torch.tensor([1.0, 2.0, 2.0, 0.0, -math.inf])
    assert odds(sampler(rule(top_k=1)), scores_V).nonzero().flatten().tolist() == [1, 2]
    assert odds(sampler(rule(top_k=3)), scores_V).nonzero().flatten().tolist() == [0, 1, 2]
    assert odds(sampler(rule(top_k=9)), scores_V).nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("scores_V", [logits(3), torch.zeros(50)])
@pytest.mark.parametrize("cut", [{"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_best_token_survives_the_hardest_cut(scores_V: Tensor, cut: dict[str, float]) -> None:
    chosen, _ = sampler(rule(**cut)).sample(scores_V)  # type: ignore[arg-type]
    assert scores_V[chosen] == scores_V.max()


def test_ties_at_the_edge_of_top_p_all_stay() -> None:
    scores_V = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    assert odds(sampler(rule(top_p=0.6)), scores_V).nonzero().flatten().tolist() == [0, 1, 2]


def test_a_top_k_of_one_takes_the_first_of_the_best() -> None:
    chooser = sampler(rule(5.0, top_k=1))
    assert {chooser.sample(torch.tensor([1.0, 2.0, 2.0]))[0] for _ in range(20)} == {1}


def test_temperature_zero_is_the_largest_score() -> None:
    assert sampler(rule(temperature=0.0)).sample(logits(1))[0] == logits(1).argmax().item()


def test_the_penalty_counts_prompt_and_answer() -> None:
    scores_V = torch.zeros(50)
    scores_V[7], scores_V[8], scores_V[9] = 3.0, 2.9, 2.8
    chooser = sampler(rule(temperature=0.0, repetition_penalty=2.0), prompt=[7])
    assert [chooser.sample(scores_V)[0] for _ in range(3)] == [8, 9, 7]


def test_presence_and_frequency_count_the_answer_alone() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting tokens sampled before."""
    chooser = sampler(
        rule(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25), prompt=[7, 7, 7]
    )
    scores_V = torch.zeros(50)
    scores_V[7], scores_V[8] = 3.0, 2.1
    # 7 falls to 2.25, 2.0; then 8 falls to 1.35, and 7 is best again.
    assert [chooser.sample(scores_V)[0] for _ in range(5)] == [7, 7, 8, 7, 7]
    want_V = scores_V.clone()
    want_V[7] -= 0.5 + 4 * 0.25
    want_V[8] -= 0.5 + 0.25
    assert torch.equal(chooser._adjust(scores_V), want_V)


def test_negative_penalties_attract() -> None:
    chooser = sampler(rule(temperature=0.0, presence_penalty=-1.0))
    assert chooser.sample(torch.eye(50)[4])[0] == 4
    assert chooser.sample(torch.eye(50)[5] * 0.9)[0] == 4


def test_a_bias_forbids_and_forces() -> None:
    scores_V = logits(1)
    best = int(scores_V.argmax())
    assert sampler(rule(logit_bias=((best, -100.0),))).sample(scores_V)[0] != best
    assert sampler(rule(logit_bias=((13, 100.0),))).sample(scores_V)[0] == 13


def test_a_bias_for_a_token_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"logit_bias: 50 is not a token .* whose ids end at 49"):
        sampler(rule(logit_bias=((3, 1.0), (50, 1.0))))


def test_the_logits_are_never_written_to() -> None:
    scores_V = logits(1)
    everything = rule(
        0.7,
        20,
        0.9,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=1.0,
        frequency_penalty=1.0,
        logit_bias=((3, 1.0),),
    )
    chooser = sampler(everything, prompt=[1, 2])
    for _ in range(3):
        chooser.sample(scores_V)
    assert torch.equal(scores_V, logits(1))


def test_greedy_with_nothing_else_on_takes_the_logits_as_they_are() -> None:
    scores_V = logits(1).bfloat16()
    assert sampler(rule(0.0))._adjust(scores_V) is scores_V


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


def test_a_draw_depends_on_its_place_and_its_logits_alone() -> None:
    """Whatever was drawn from before, and by which cuts: the n-th draw spends the n-th number."""
    one, two = sampler(rule(), 5), sampler(rule(2.0, 3, 0.5), 5)
    for i in range(20):
        one.sample(logits(i))
        two.sample(logits(100 + i))
    two.rule = one.rule
    assert one.sample(logits(77)) == two.sample(logits(77))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "by",
    [
        rule(0.0, repetition_penalty=1.5, presence_penalty=0.5, logit_bias=((3, 2.0),)),
        rule(0.9, 20, 0.9, min_p=0.01),
        rule(1.0, 0, 0.8),
        rule(),
    ],
)
def test_a_gpu_draws_what_the_cpu_draws(by: Rule) -> None:
    here, there = (
        Sampler(by, [1, 2], vocab_size=5000, device=torch.device(device), seed=4)
        for device in ("cpu", "cuda")
    )
    for i in range(50):
        logits_V = logits(i, 5000)
        assert here.sample(logits_V)[0] == there.sample(logits_V.cuda())[0]


def test_unlikely_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should() -> None:
    """Half the odds on the first token, half on 100,000 others."""
    scores_V = torch.zeros(100_001)
    scores_V[0] = math.log(100_000)
    chooser = Sampler(rule(), [], vocab_size=len(scores_V), device=CPU, seed=3)
    drawn = torch.tensor([chooser.sample(scores_V)[0] for _ in range(400)])
    assert 0.4 < (drawn == 0).float().mean() < 0.6
    assert 0.15 < (drawn > 50_000).float().mean() < 0.35


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
        ({"repetition_penalty": 1.2}, OFFICIAL, rule(0.01, 1, 0.001, repetition_penalty=1.2)),
        (
            {"min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {3: 2}},
            OFFICIAL,
            rule(
                0.01,
                1,
                0.001,
                min_p=0.1,
                presence_penalty=1,
                frequency_penalty=-1,
                logit_bias=((3, 2),),
            ),
        ),
    ],
)
def test_open_fields_take_the_checkpoints_habits(
    params: dict[str, Any], defaults: GenerationDefaults, want: Rule
) -> None:
    assert Rule.resolve(SamplingParams(**params), defaults) == want
