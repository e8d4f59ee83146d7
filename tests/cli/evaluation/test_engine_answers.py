"""EngineAnswerer: greedy answers of a real engine, their log probabilities, batches that repeat."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qwen2vl.cli.evaluation.engine_answers import (
    EngineAnswerer,
    context_arguments,
    engine_config,
)
from qwen2vl.engine import LLM
from qwen2vl.eval.runner.run import BATCH_SIZE, SuiteAnswer
from qwen2vl.eval.suites.synthetic_suite import SyntheticSuite
from qwen2vl.weights import resolve_model

SUITE = SyntheticSuite()
BATCH = [SUITE.messages(item) for item in SUITE.items(["counting"])[:6]]


@pytest.fixture
def llm() -> LLM:
    return LLM("nano", engine=engine_config())


def test_answers_are_those_of_greedy_decoding(llm: LLM) -> None:
    counted: list[int] = []
    answers = EngineAnswerer(llm, 5).answer(BATCH, lambda: counted.append(1))
    expected = llm.chat(BATCH, temperature=0, repetition_penalty=1, max_tokens=5, logprobs=0)
    assert [answer.text for answer in answers] == [one.text for one in expected]
    assert [answer.prompt_tokens for answer in answers] == [one.prompt_tokens for one in expected]
    assert len(counted) == len(BATCH) and len({answer.logprob for answer in answers}) > 1
    for answer, one in zip(answers, expected, strict=True):
        assert answer.logprob == pytest.approx(one.cumulative_logprob, abs=0.1)
        assert answer.logprob is not None and 0 < math.exp(answer.logprob) <= 1


def test_a_batch_is_computed_alike_whatever_came_before(llm: LLM) -> None:
    answerer = EngineAnswerer(llm, 5)
    first, hits = answer_and_count_hits(llm, answerer)
    answerer.answer(BATCH[3:] * 2, lambda: None)
    assert answer_and_count_hits(llm, answerer) == (first, hits)


def answer_and_count_hits(llm: LLM, answerer: EngineAnswerer) -> tuple[list[SuiteAnswer], int]:
    """Return the answers to the batch, and the tokens found in the prefix cache meanwhile."""
    before = llm.stats().prefix_cache_hits
    answers = list(answerer.answer(BATCH, lambda: None))
    return answers, llm.stats().prefix_cache_hits - before


def test_a_whole_batch_runs_at_once() -> None:
    assert engine_config().max_num_seqs == BATCH_SIZE


def test_a_longer_context_than_the_models_takes_more_tokens() -> None:
    folder = resolve_model("nano")
    assert context_arguments(folder, None) == context_arguments(folder, 4096) == {}
    with LLM(folder, **context_arguments(folder, 5000)) as llm:
        image = {"type": "image", "image": np.zeros((840, 840, 3), np.uint8)}  # 900 tokens
        content = [*([image] * 5), {"type": "text", "text": "What is this?"}]
        (answer,) = EngineAnswerer(llm, 2).answer(
            [[{"role": "user", "content": content}]], lambda: None
        )
    assert answer.prompt_tokens is not None and answer.prompt_tokens > 4500  # nano has 4,096
