"""Batched sampling chooses the same tokens as sampling one by one, with the same draws."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.engine import runner
from qwen2vl.engine.sampling.batched import sample_batch
from qwen2vl.engine.sampling.sampler import ResolvedSamplingParams, Sampler
from qwen2vl.errors import EngineError
from tests.engine.test_runner import CONVERSATIONS, new_llm
from tests.engine.test_runner import GREEDY as REPORTED

CPU = torch.device("cpu")
VOCAB_SIZE = 97

PARAMS = st.builds(
    ResolvedSamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 2, 7, VOCAB_SIZE - 1, VOCAB_SIZE, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01, 0.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


def make_sampler(resolved: ResolvedSamplingParams, seed: int = 0, **options: int) -> Sampler:
    return Sampler(resolved, [1, 2], vocab_size=VOCAB_SIZE, device=CPU, seed=seed, **options)


def resolved(temperature: float = 1.0, **fields: float) -> ResolvedSamplingParams:
    fields = {"temperature": temperature, "top_k": 0, "top_p": 1.0, **fields}
    return ResolvedSamplingParams(**fields)  # type: ignore[arg-type]


def draw_logits(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, VOCAB_SIZE, generator=generator)).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    batch_params=st.lists(PARAMS, min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_batched_sampling_equals_sampling_one_by_one(
    batch_params: list[ResolvedSamplingParams], seed: int, dtype: torch.dtype
) -> None:
    """Over several steps, so that random numbers used twice or skipped are detected."""
    together = [make_sampler(params, seed + n) for n, params in enumerate(batch_params)]
    one_by_one = [make_sampler(params, seed + n) for n, params in enumerate(batch_params)]
    for step in range(4):
        logits_RV = draw_logits(len(batch_params), seed + step, dtype)
        expected = [
            sampler.sample(logits_V)[0]
            for sampler, logits_V in zip(one_by_one, logits_RV, strict=True)
        ]
        assert sample_batch(together, logits_RV) == expected


@pytest.mark.parametrize("params", [resolved(top_k=3), resolved(top_p=0.5), resolved(min_p=1.0)])
def test_ties_at_a_threshold_are_all_kept(params: ResolvedSamplingParams) -> None:
    logits_RV = torch.full((1, VOCAB_SIZE), -math.inf)
    logits_RV[0, 10:18] = 2.0  # eight tied logits
    together, one_by_one = make_sampler(params), make_sampler(params)
    drawn: set[int] = set()
    for _ in range(200):
        (token,) = sample_batch([together], logits_RV)
        assert token == one_by_one.sample(logits_RV[0])[0]
        assert isinstance(token, int)
        drawn.add(token)
    assert drawn == set(range(10, 18))


def test_draws_follow_the_probabilities() -> None:
    logits_RV = torch.full((1, VOCAB_SIZE), -math.inf)
    logits_RV[0, 5], logits_RV[0, 90] = math.log(0.75), math.log(0.25)
    sampler = make_sampler(resolved())
    tokens = [sample_batch([sampler], logits_RV)[0] for _ in range(2000)]
    assert tokens.count(5) / 2000 == pytest.approx(0.75, abs=0.04)
    assert tokens.count(5) + tokens.count(90) == 2000


@pytest.mark.parametrize("non_finite", [math.nan, math.inf])
def test_non_finite_logits_fail_only_their_own_row(non_finite: float) -> None:
    logits_RV = draw_logits(3, 0)
    logits_RV[1, 40] = non_finite
    samplers = [make_sampler(resolved()), make_sampler(resolved()), make_sampler(resolved(0.0))]
    first, failed, last = sample_batch(samplers, logits_RV)
    assert isinstance(failed, EngineError) and "not finite" in str(failed)
    assert first == make_sampler(resolved()).sample(logits_RV[0])[0]
    assert last == int(logits_RV[2].argmax())


def test_supports_batched_sampling() -> None:
    assert make_sampler(resolved(top_k=5, top_p=0.9, min_p=0.1)).supports_batched_sampling
    assert not make_sampler(resolved(), num_logprobs=0).supports_batched_sampling
    for unsupported in (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": ((3, 1.0),)},
    ):
        assert not make_sampler(resolved(**unsupported)).supports_batched_sampling  # type: ignore[arg-type]


def test_an_unused_random_number_is_used_for_the_next_draw() -> None:
    first, second = make_sampler(resolved()), make_sampler(resolved())
    logits_V = draw_logits(1, 0)[0]
    assert first.uniform() == first.uniform()
    assert first.sample(logits_V) == second.sample(logits_V)
    assert first.uniform() == second.uniform()


def test_a_step_mixes_batched_and_single_sampling() -> None:
    """Requests with logprobs, random, greedy and speculative, beside chunked prefills."""
    batch_params = [
        replace(REPORTED, logprobs=None),
        REPORTED,
        replace(REPORTED, logprobs=None, temperature=2.0, top_k=0, seed=3),
        replace(REPORTED, logprobs=None, temperature=2.0, top_k=9, top_p=0.8, seed=4),
        replace(REPORTED, logprobs=None, temperature=2.0, repetition_penalty=1.3, seed=5),
        replace(REPORTED, logprobs=None),
    ]
    num_batched = 0
    sample_batched = runner._sample_batched

    def counting_sample_batched(*args: Any) -> Any:
        nonlocal num_batched
        results = sample_batched(*args)
        num_batched += len(results)
        return results

    def sample_as_on_a_gpu(*args: Any, batch: bool) -> Any:
        return sample(*args, batch=True)

    sample = runner._sample
    expected = [
        new_llm().chat(CONVERSATIONS[n], params)[0] for n, params in enumerate(batch_params)
    ]
    with (
        patch.object(runner, "_sample", sample_as_on_a_gpu),
        patch.object(runner, "_sample_batched", counting_sample_batched),
    ):
        llm = new_llm(max_num_batched_tokens=64, num_speculative_tokens=2)
        got = llm.chat(CONVERSATIONS[: len(batch_params)], batch_params)
    assert [completion.token_ids for completion in got] == [
        completion.token_ids for completion in expected
    ]
    assert 8 < num_batched <= 4 * 8
