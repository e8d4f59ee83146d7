"""All at once and one by one the samplers choose the same, with the same draws."""

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
from qwen2vl.engine.sampling.batched import choose
from qwen2vl.engine.sampling.sampler import Rule, Sampler
from qwen2vl.errors import EngineError
from tests.engine.test_runner import CONVERSATIONS, fresh
from tests.engine.test_runner import GREEDY as REPORTED

CPU = torch.device("cpu")
SIZE = 97

RULES = st.builds(
    Rule,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 2, 7, SIZE - 1, SIZE, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


def sampler_of(rule: Rule, seed: int = 0, **options: int) -> Sampler:
    return Sampler(rule, [1, 2], vocab_size=SIZE, device=CPU, seed=seed, **options)


def rule(temperature: float = 1.0, **more: float) -> Rule:
    return Rule(**{"temperature": temperature, "top_k": 0, "top_p": 1.0, **more})  # type: ignore[arg-type]


def draw_logits(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, SIZE, generator=generator)).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    rules=st.lists(RULES, min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_at_once_is_one_by_one(rules: list[Rule], seed: int, dtype: torch.dtype) -> None:
    """Over several steps, so that draws that were spent or kept too long would be noticed."""
    together = [sampler_of(one, seed + n) for n, one in enumerate(rules)]
    alone = [sampler_of(one, seed + n) for n, one in enumerate(rules)]
    for step in range(4):
        logits_RV = draw_logits(len(rules), seed + step, dtype)
        want = [one.sample(logits_V)[0] for one, logits_V in zip(alone, logits_RV, strict=True)]
        assert choose(together, logits_RV) == want


@pytest.mark.parametrize("one", [rule(top_k=3), rule(top_p=0.5), rule(min_p=1.0)])
def test_ties_at_an_edge_all_stay(one: Rule) -> None:
    logits_RV = torch.full((1, SIZE), -math.inf)
    logits_RV[0, 10:18] = 2.0  # eight of the same
    together, alone = sampler_of(one), sampler_of(one)
    drawn: set[int] = set()
    for _ in range(200):
        (token,) = choose([together], logits_RV)
        assert token == alone.sample(logits_RV[0])[0]
        assert isinstance(token, int)
        drawn.add(token)
    assert drawn == set(range(10, 18))


def test_the_draws_follow_the_weights() -> None:
    logits_RV = torch.full((1, SIZE), -math.inf)
    logits_RV[0, 5], logits_RV[0, 90] = math.log(0.75), math.log(0.25)
    sampler = sampler_of(rule())
    tokens = [choose([sampler], logits_RV)[0] for _ in range(2000)]
    assert tokens.count(5) / 2000 == pytest.approx(0.75, abs=0.04)
    assert tokens.count(5) + tokens.count(90) == 2000


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_fail_their_own_row(bad: float) -> None:
    logits_RV = draw_logits(3, 0)
    logits_RV[1, 40] = bad
    samplers = [sampler_of(rule()), sampler_of(rule()), sampler_of(rule(0.0))]
    first, broken, last = choose(samplers, logits_RV)
    assert isinstance(broken, EngineError) and "not finite" in str(broken)
    assert first == sampler_of(rule()).sample(logits_RV[0])[0]
    assert last == int(logits_RV[2].argmax())


def test_only_a_plain_sampler_says_so() -> None:
    assert sampler_of(rule(top_k=5, top_p=0.9, min_p=0.1)).is_plain
    assert not sampler_of(rule(), num_logprobs=0).is_plain
    for special in (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": ((3, 1.0),)},
    ):
        assert not sampler_of(rule(**special)).is_plain  # type: ignore[arg-type]


def test_a_draw_that_was_not_taken_is_the_next_one() -> None:
    one, other = sampler_of(rule()), sampler_of(rule())
    logits_V = draw_logits(1, 0)[0]
    assert one.uniform() == one.uniform()
    assert one.sample(logits_V) == other.sample(logits_V)
    assert one.uniform() == other.uniform()


def test_a_step_chooses_at_once_and_one_by_one_what_each_needs() -> None:
    """Reported, drawn, greedy and drafted answers beside prompts that go on."""
    wishes = [
        replace(REPORTED, logprobs=None),
        REPORTED,
        replace(REPORTED, logprobs=None, temperature=2.0, top_k=0, seed=3),
        replace(REPORTED, logprobs=None, temperature=2.0, top_k=9, top_p=0.8, seed=4),
        replace(REPORTED, logprobs=None, temperature=2.0, repetition_penalty=1.3, seed=5),
        replace(REPORTED, logprobs=None),
    ]
    chosen = 0
    at_once = runner._chosen_at_once

    def counted(*given: Any) -> Any:
        nonlocal chosen
        found = at_once(*given)
        chosen += len(found)
        return found

    def as_on_a_gpu(*given: Any, at_once: bool) -> Any:
        return sample(*given, at_once=True)

    sample = runner._sample
    want = [fresh().chat(CONVERSATIONS[n], wish)[0] for n, wish in enumerate(wishes)]
    with (
        patch.object(runner, "_sample", as_on_a_gpu),
        patch.object(runner, "_chosen_at_once", counted),
    ):
        llm = fresh(max_step_tokens=64, num_drafts=2)
        got = llm.chat(CONVERSATIONS[: len(wishes)], wishes)
    assert [one.token_ids for one in got] == [one.token_ids for one in want]
    assert 8 < chosen <= 4 * 8
