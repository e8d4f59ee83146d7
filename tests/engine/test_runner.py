"""Every way through the engine gives the answers of one request alone in a fresh engine, fp32."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.grammar import Grammar
from qwen2vl.engine.params import Completion
from qwen2vl.errors import InputError
from tests.engine.test_llm import clip, picture, user
from tests.parity.oracle import random_model
from tests.tiny import tiny_config, tiny_processor

MODEL = random_model(tiny_config(tie_word_embeddings=False))
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [user("Hi")],
    [user("What is this?", picture())],
    [user("What is this?", picture(seed=1))],  # the same ids, other pixels
    [user("And these?", picture(84, 56), picture(140, 140, seed=2))],
    [user("What moves?", clip(8))],
    [user("Both?", clip(4), picture())],
    [user("A longer question about a larger picture, please.", picture(224, 196, seed=3))],
    [user("What is this?", picture())],  # again
]


def fresh(**engine: Any) -> LLM:
    return LLM.of(MODEL, tiny_processor(), engine=EngineConfig(**engine))


def scores(completion: Completion) -> list[float]:
    return [entry.logprob for entry in completion.logprobs or ()]


@lru_cache
def alone(index: int, params: SamplingParams = GREEDY) -> Completion:
    """The oracle: this conversation is the only one that its engine ever saw."""
    return fresh().chat(CONVERSATIONS[index], params)[0]


def assert_same(got: Completion, want: Completion) -> None:
    assert got.token_ids == want.token_ids
    np.testing.assert_allclose(scores(got), scores(want), rtol=0, atol=2e-5)


def test_the_conversations_differ() -> None:
    """Else nothing would be shown: all but the repeated one, by far more than the tolerance."""
    every = [scores(alone(index)) for index in range(len(CONVERSATIONS) - 1)]
    for one, other in combinations(every, 2):
        assert np.abs(np.subtract(one, other)).max() > 1e-3


def test_batched_is_alone() -> None:
    for index, one in enumerate(fresh().chat(CONVERSATIONS, GREEDY)):
        assert_same(one, alone(index))


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(32, 90),
    patches=st.integers(4, 90),
    sequences=st.integers(1, 4),
    cache=st.integers(320, 640),
    order=st.permutations(range(len(CONVERSATIONS))),
)
def test_no_budget_changes_an_answer(
    tokens: int, patches: int, sequences: int, cache: int, order: list[int]
) -> None:
    """Chunks that end inside pictures, clips in parts, rows preempted and found again."""
    llm = fresh(
        max_step_tokens=tokens,
        max_step_patches=patches,
        max_sequences=sequences,
        cache_tokens=cache,
        vision_cache_bytes=0,
    )
    for index, one in zip(order, llm.chat([CONVERSATIONS[i] for i in order], GREEDY), strict=True):
        assert_same(one, alone(index))
    assert llm.scheduler.pool.num_busy == 0


def test_a_row_that_gave_way_goes_on_as_if_nothing_had_been() -> None:
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, logprobs=0)
    llm = fresh(cache_tokens=320)
    left: list[int] = []
    leave = llm.scheduler._leave

    def watched(sequence: Any, **kwargs: Any) -> None:
        if sequence.finish_reason is None:
            left.append(len(sequence.token_ids))
        leave(sequence, **kwargs)

    llm.scheduler._leave = watched  # type: ignore[method-assign]
    for index, one in enumerate(llm.chat(CONVERSATIONS[:3], params)):
        assert_same(one, alone(index, params))
    assert max(left) > 10  # somebody had begun to answer


def test_a_second_turn_finds_the_first() -> None:
    llm = fresh()
    (first,) = llm.chat([user("What is this, and what stands beside it?", picture())], GREEDY)
    assert first.cached_tokens == 0
    talk = [
        user("What is this, and what stands beside it?", picture()),
        {"role": "assistant", "content": "A square."},
        user("Why?"),
    ]
    (second,) = llm.chat(talk, GREEDY)
    assert second.cached_tokens >= first.prompt_tokens - 64
    assert second.seconds.vision == 0
    assert_same(second, fresh().chat(talk, GREEDY)[0])


def test_pictures_that_share_all_ids_do_not_share_rows() -> None:
    llm = fresh()
    llm.chat(CONVERSATIONS[1], GREEDY)
    (other,) = llm.chat(CONVERSATIONS[2], GREEDY)
    assert_same(other, alone(2))
    assert other.cached_tokens == 32  # the system turn


def test_a_known_picture_costs_no_vision_also_after_a_restart(tmp_path: Path) -> None:
    question = [user("What is this?", picture())]
    (cold,) = fresh(vision_cache_dir=tmp_path).chat(question, GREEDY)
    llm = fresh(vision_cache_dir=tmp_path)
    llm.model.encode = None  # type: ignore[assignment]
    try:
        (warm,) = llm.chat(question, GREEDY)
    finally:
        del llm.model.encode
    assert_same(warm, cold)
    assert warm.seconds.vision == 0


def test_samples_share_their_prompt_and_differ() -> None:
    params = replace(GREEDY, temperature=3.0, top_k=0, n=3, seed=5)
    question = [user("Tell me a rather long story about this picture.", picture(112, 112))]
    llm = fresh()
    several = llm.chat(question, params)
    assert len({one.token_ids for one in several}) == 3
    assert [c.cached_tokens > 32 for c in several] == [False, True, True]
    for sample, one in enumerate(several):
        assert_same(one, fresh().chat(question, replace(params, n=1, seed=5 + sample))[0])


def test_a_cancelled_request_gives_everything_back() -> None:
    llm = fresh()
    prompt = llm.processor([user("Hi", picture())])
    kept, gone = llm.sequences(prompt, GREEDY) + llm.sequences(prompt, GREEDY)
    for one in (kept, gone):
        llm.scheduler.add(one)
    for _ in range(3):
        llm.step()
    llm.cancel(gone)
    llm.cancel(gone)  # twice does no harm
    while llm.scheduler.has_work:
        llm.step()
    assert len(kept.token_ids) == 8 and gone.finish_reason is None
    assert llm.scheduler.pool.num_busy == 0
    llm.forget()
    assert llm.scheduler.pool.num_free == llm.scheduler.pool.num_blocks


def test_one_that_needs_too_much_memory_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fresh()
    forward = llm.runner._forward

    def limited(chunks: Any) -> torch.Tensor:
        if sum(len(chunk.ids) for chunk in chunks) > 60:
            raise MemoryError
        return forward(chunks)

    monkeypatch.setattr(llm.runner, "_forward", limited)
    large, small = llm.chat([CONVERSATIONS[6], CONVERSATIONS[0]], GREEDY)
    assert large.finish_reason == "error" and "out of memory" in (large.error or "")
    assert_same(small, alone(0))


@pytest.mark.slow
def test_nothing_grows_over_many_requests() -> None:
    llm = fresh(cache_tokens=2048, vision_cache_bytes=100_000)
    rng = np.random.default_rng(0)
    for batch in range(100):
        asked = [
            [
                user(
                    f"Question {rng.integers(50)}",
                    picture(56, 28 * int(rng.integers(2, 6)), int(seed)),
                )
            ]
            for seed in rng.integers(0, 200, 20)
        ]
        llm.chat(asked, SamplingParams(temperature=0, max_tokens=int(rng.integers(1, 9))))
        held = sum(cache.capacity for cache in llm.runner.caches.values())
        assert held <= 2048, batch
        assert llm.runner.shelf.cache.stats.num_bytes <= 100_000
        assert not llm.runner.shelf._rows
    assert llm.scheduler.pool.num_busy == 0


@pytest.mark.parametrize("num_drafts", [0, 6])
def test_a_grammar_holds_its_answer_and_no_other(num_drafts: int) -> None:
    pytest.importorskip("llguidance")
    held = SamplingParams(temperature=0, grammar=Grammar.choice(["a red square", "a blue star"]))
    llm = fresh(num_drafts=num_drafts)
    free, bound, again = llm.chat(
        [CONVERSATIONS[1], CONVERSATIONS[1], CONVERSATIONS[0]], [GREEDY, held, GREEDY]
    )
    assert bound.text in ("a red square", "a blue star")
    assert bound.finish_reason == "stop"
    assert_same(free, alone(1))
    assert_same(again, alone(0))


def test_an_impossible_grammar_is_refused_before_anything_is_computed() -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(InputError, match="regex"):
        fresh().chat(CONVERSATIONS[0], SamplingParams(grammar=Grammar.regex("(")))
