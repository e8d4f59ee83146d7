"""Sampler: equality with transformers' logits processors, seeds, and non-finite logits."""

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
from qwen2vl.engine.sampling.sampler import ResolvedSamplingParams, Sampler, top_k_top_p_filter
from qwen2vl.errors import EngineError, InputError
from qwen2vl.weights import GenerationDefaults

CPU = torch.device("cpu")
OFFICIAL = GenerationDefaults(
    do_sample=True, temperature=0.01, top_p=0.001, top_k=1, repetition_penalty=1.0
)


def logits(seed: int, size: int = 50) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 4


def resolved(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, **fields: Any
) -> ResolvedSamplingParams:
    return ResolvedSamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, **fields)


def sampler(
    resolved: ResolvedSamplingParams, seed: int | None = 0, prompt: list[int] | None = None
) -> Sampler:
    return Sampler(resolved, prompt or [], vocab_size=50, device=CPU, seed=seed)


def probs(under_test: Sampler, logits_V: Tensor) -> Tensor:
    """Return the probabilities of the next token over the vocabulary, without sampling."""
    ids_K, weights_K = top_k_top_p_filter(under_test._process_logits(logits_V), under_test.params)
    return torch.zeros(len(logits_V)).index_copy(0, ids_K, weights_K / weights_K.sum())


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.01, 5),
    top_k=st.integers(1, 70),
    top_p=st.one_of(st.just(0.0), st.floats(0.001, 0.999)),
    min_p=st.floats(0.001, 1),
    penalty=st.floats(0.3, 3),
    bias=st.dictionaries(st.integers(0, 49), st.floats(-100, 100), min_size=1, max_size=5),
    prompt_ids=st.lists(st.integers(0, 49), min_size=1, max_size=20),
)
@settings(max_examples=300)
def test_probabilities_equal_those_of_transformers(
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    bias: dict[int, float],
    prompt_ids: list[int],
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
    expected_V = reference(torch.tensor([prompt_ids]), logits(seed)[None].clone())[0].softmax(-1)
    params = resolved(
        temperature,
        top_k,
        top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        logit_bias=tuple(bias.items()),
    )
    got_V = probs(sampler(params, prompt=prompt_ids), logits(seed))
    assert torch.equal(got_V > 0, expected_V > 0)
    torch.testing.assert_close(got_V, expected_V, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_top_p_of_a_whole_vocabulary_equals_transformers(top_p: float, scale: float) -> None:
    scores_V = logits(5, 20_000) * scale
    expected_V = TopPLogitsWarper(top_p)(torch.tensor([[]]), scores_V[None])[0].softmax(-1)
    got_V = probs(sampler(resolved(top_p=top_p)), scores_V)
    assert (got_V > 0).sum() == pytest.approx((expected_V > 0).sum(), abs=1)
    torch.testing.assert_close(got_V, expected_V, rtol=2e-3, atol=1e-6)


def test_ties_at_top_k_are_all_kept() -> None:
    scores_V = torch.tensor([1.0, 2.0, 2.0, 0.0, -math.inf])
    assert probs(sampler(resolved(top_k=1)), scores_V).nonzero().flatten().tolist() == [1, 2]
    assert probs(sampler(resolved(top_k=3)), scores_V).nonzero().flatten().tolist() == [0, 1, 2]
    assert probs(sampler(resolved(top_k=9)), scores_V).nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("scores_V", [logits(3), torch.zeros(50)])
@pytest.mark.parametrize("filter_params", [{"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_most_likely_token_is_always_kept(
    scores_V: Tensor, filter_params: dict[str, float]
) -> None:
    token, _ = sampler(resolved(**filter_params)).sample(scores_V)  # type: ignore[arg-type]
    assert scores_V[token] == scores_V.max()


def test_ties_at_top_p_are_all_kept() -> None:
    scores_V = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    assert probs(sampler(resolved(top_p=0.6)), scores_V).nonzero().flatten().tolist() == [0, 1, 2]


def test_top_k_1_takes_the_first_of_tied_maxima() -> None:
    under_test = sampler(resolved(5.0, top_k=1))
    assert {under_test.sample(torch.tensor([1.0, 2.0, 2.0]))[0] for _ in range(20)} == {1}


def test_temperature_zero_is_argmax() -> None:
    assert sampler(resolved(temperature=0.0)).sample(logits(1))[0] == logits(1).argmax().item()


def test_repetition_penalty_covers_prompt_and_output() -> None:
    scores_V = torch.zeros(50)
    scores_V[7], scores_V[8], scores_V[9] = 3.0, 2.9, 2.8
    under_test = sampler(resolved(temperature=0.0, repetition_penalty=2.0), prompt=[7])
    assert [under_test.sample(scores_V)[0] for _ in range(3)] == [8, 9, 7]


def test_presence_and_frequency_penalties_cover_the_output_only() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting tokens sampled before."""
    under_test = sampler(
        resolved(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25), prompt=[7, 7, 7]
    )
    scores_V = torch.zeros(50)
    scores_V[7], scores_V[8] = 3.0, 2.1
    # The logit of 7 falls to 2.25, 2.0; then that of 8 to 1.35, and 7 is the maximum again.
    assert [under_test.sample(scores_V)[0] for _ in range(5)] == [7, 7, 8, 7, 7]
    expected_V = scores_V.clone()
    expected_V[7] -= 0.5 + 4 * 0.25
    expected_V[8] -= 0.5 + 0.25
    assert torch.equal(under_test._process_logits(scores_V), expected_V)


def test_negative_penalties_promote_repetition() -> None:
    under_test = sampler(resolved(temperature=0.0, presence_penalty=-1.0))
    assert under_test.sample(torch.eye(50)[4])[0] == 4
    assert under_test.sample(torch.eye(50)[5] * 0.9)[0] == 4


def test_logit_bias_can_forbid_and_force_tokens() -> None:
    scores_V = logits(1)
    best = int(scores_V.argmax())
    assert sampler(resolved(logit_bias=((best, -100.0),))).sample(scores_V)[0] != best
    assert sampler(resolved(logit_bias=((13, 100.0),))).sample(scores_V)[0] == 13


def test_logit_bias_outside_the_vocabulary_is_rejected() -> None:
    with pytest.raises(InputError, match=r"logit_bias: 50 is not a token .* whose ids end at 49"):
        sampler(resolved(logit_bias=((3, 1.0), (50, 1.0))))


def test_the_logits_are_never_written_to() -> None:
    scores_V = logits(1)
    all_features = resolved(
        0.7,
        20,
        0.9,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=1.0,
        frequency_penalty=1.0,
        logit_bias=((3, 1.0),),
    )
    under_test = sampler(all_features, prompt=[1, 2])
    for _ in range(3):
        under_test.sample(scores_V)
    assert torch.equal(scores_V, logits(1))


def test_plain_greedy_does_not_copy_the_logits() -> None:
    scores_V = logits(1).bfloat16()
    assert sampler(resolved(0.0))._process_logits(scores_V) is scores_V


def test_draws_follow_the_probabilities() -> None:
    scores_V = torch.tensor([0.5, 0.3, 0.2]).log()
    under_test = Sampler(resolved(), [], vocab_size=3, device=CPU, seed=1)
    counts = torch.zeros(3)
    for _ in range(3000):
        counts[under_test.sample(scores_V)[0]] += 1
    assert torch.allclose(counts / 3000, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


def test_the_same_seed_draws_the_same() -> None:
    first, repeated, other = (
        [under_test.sample(logits(i))[0] for i in range(40)]
        for under_test in (
            sampler(resolved(), 5),
            sampler(resolved(), 5),
            sampler(resolved(), 6),
        )
    )
    assert first == repeated
    assert first != other


def test_without_a_seed_draws_differ() -> None:
    first, second = (
        [under_test.sample(logits(i))[0] for i in range(40)]
        for under_test in (sampler(resolved(), None), sampler(resolved(), None))
    )
    assert first != second


def test_seeds_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    sampler(resolved(), 5).sample(logits(0))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_allowed_seed_works(seed: int) -> None:
    sampler(resolved(), seed).sample(logits(0))


def test_a_draw_depends_only_on_its_index_and_its_logits() -> None:
    """Whatever the earlier logits and filters: the n-th draw uses the n-th random number."""
    first, second = sampler(resolved(), 5), sampler(resolved(2.0, 3, 0.5), 5)
    for i in range(20):
        first.sample(logits(i))
        second.sample(logits(100 + i))
    second.params = first.params
    assert first.sample(logits(77)) == second.sample(logits(77))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "params",
    [
        resolved(0.0, repetition_penalty=1.5, presence_penalty=0.5, logit_bias=((3, 2.0),)),
        resolved(0.9, 20, 0.9, min_p=0.01),
        resolved(1.0, 0, 0.8),
        resolved(),
    ],
)
def test_draws_on_gpu_and_cpu_are_equal(params: ResolvedSamplingParams) -> None:
    cpu_sampler, gpu_sampler = (
        Sampler(params, [1, 2], vocab_size=5000, device=torch.device(device), seed=4)
        for device in ("cpu", "cuda")
    )
    for i in range(50):
        logits_V = logits(i, 5000)
        assert cpu_sampler.sample(logits_V)[0] == gpu_sampler.sample(logits_V.cuda())[0]


def test_unlikely_tokens_of_a_large_vocabulary_have_correct_frequencies() -> None:
    """Half the probability on the first token, half on 100,000 others."""
    scores_V = torch.zeros(100_001)
    scores_V[0] = math.log(100_000)
    under_test = Sampler(resolved(), [], vocab_size=len(scores_V), device=CPU, seed=3)
    drawn = torch.tensor([under_test.sample(scores_V)[0] for _ in range(400)])
    assert 0.4 < (drawn == 0).float().mean() < 0.6
    assert 0.15 < (drawn > 50_000).float().mean() < 0.35


def test_logprobs_are_computed_before_filtering() -> None:
    under_test = Sampler(
        resolved(temperature=0.5, top_k=1), [], vocab_size=50, device=CPU, seed=0, num_logprobs=3
    )
    token, report = under_test.sample(logits(2))
    expected_V = logits(2).log_softmax(-1)
    assert report is not None
    assert report.token_id == token
    assert math.isclose(report.logprob, expected_V[token].item())
    assert [i for i, _ in report.top] == expected_V.topk(3).indices.tolist()


def test_logprobs_zero_reports_only_the_sampled_token() -> None:
    under_test = Sampler(resolved(0.0), [], vocab_size=50, device=CPU, num_logprobs=0)
    _, report = under_test.sample(logits(2))
    assert report is not None
    assert report.top == ()


@pytest.mark.parametrize("non_finite", [math.nan, math.inf])
def test_non_finite_logits_are_an_error(non_finite: float) -> None:
    scores_V = logits(0)
    scores_V[4] = non_finite
    with pytest.raises(EngineError, match=r"not finite.*doctor --check-weights"):
        sampler(resolved(temperature=0.0)).sample(scores_V)


def test_half_precision_logits_are_converted_to_float32() -> None:
    scores_V = torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16)
    under_test = Sampler(resolved(0.01), [], vocab_size=3, device=CPU, seed=0, num_logprobs=3)
    _, report = under_test.sample(scores_V)
    assert report is not None
    assert math.isclose(sum(math.exp(p) for _, p in report.top), 1.0, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("params", "defaults", "expected"),
    [
        ({}, GenerationDefaults(), resolved(0.0, 50)),
        ({}, GenerationDefaults(temperature=0.7), resolved(0.0, 50)),
        ({}, GenerationDefaults(do_sample=True), resolved(1.0, 50)),
        ({}, OFFICIAL, resolved(0.01, 1, 0.001)),
        ({"temperature": 0}, OFFICIAL, resolved(0.0, 1, 0.001)),
        ({"temperature": 0.7}, GenerationDefaults(), resolved(0.7, 50)),
        ({"temperature": 0.7, "top_k": 0, "top_p": 1.0}, OFFICIAL, resolved(0.7, 0, 1.0)),
        ({"repetition_penalty": 1.2}, OFFICIAL, resolved(0.01, 1, 0.001, repetition_penalty=1.2)),
        (
            {"min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {3: 2}},
            OFFICIAL,
            resolved(
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
def test_unset_fields_take_the_generation_defaults(
    params: dict[str, Any], defaults: GenerationDefaults, expected: ResolvedSamplingParams
) -> None:
    assert ResolvedSamplingParams.resolve(SamplingParams(**params), defaults) == expected
