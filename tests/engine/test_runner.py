"""Every way through the engine gives the answers of one request alone in a fresh engine, fp32."""

from __future__ import annotations

import random
import sys
import weakref
from collections import deque
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.kv_cache.block_pool import Copy, Free, MemoryOrder, Reserve
from qwen2vl.engine.outputs import Completion
from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.errors import CapacityError, EngineError, InputError
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


# Small enough that chunks end anywhere, and that rows are preempted.
BUDGETS: dict[str, st.SearchStrategy[Any]] = {
    "tokens": st.integers(32, 90),
    "patches": st.integers(4, 90),
    "sequences": st.integers(1, 4),
    "cache": st.integers(320, 640),
    "order": st.permutations(range(len(CONVERSATIONS))),
}


def test_batched_is_alone() -> None:
    for index, one in enumerate(fresh().chat(CONVERSATIONS, GREEDY)):
        assert_same(one, alone(index))


@settings(max_examples=12, deadline=None)
@given(**BUDGETS)
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

    llm.scheduler._leave = watched
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


def test_what_rests_is_given_up_before_a_request_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fresh()
    runner, reserve, given_up = llm.runner, llm.runner._reserve, 0

    def limited(old: Any, num_tokens: int) -> Any:
        nonlocal given_up
        if sum(cache.capacity for cache in runner.caches.values()) + num_tokens > 320:
            given_up += 1
            raise MemoryError
        return reserve(old, num_tokens)

    monkeypatch.setattr(runner, "_reserve", limited)
    for index in (*range(len(CONVERSATIONS)), *range(len(CONVERSATIONS))):
        assert_same(llm.chat(CONVERSATIONS[index], GREEDY)[0], alone(index))
    assert given_up > 2


def test_vision_rows_at_rest_are_given_up_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fresh()
    cache = llm.runner.shelf.cache
    llm.chat(CONVERSATIONS[1], GREEDY)
    assert cache.stats.num_bytes
    llm.scheduler.forget()
    encode = llm.model.encode

    def limited(*given: Any) -> torch.Tensor:
        if cache.stats.num_bytes:
            raise MemoryError
        return encode(*given)

    monkeypatch.setattr(llm.model, "encode", limited)
    assert_same(llm.chat(CONVERSATIONS[2], GREEDY)[0], alone(2))


def test_what_failed_holds_no_memory_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fresh()
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner, "_forward", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(CapacityError):
            llm.chat(CONVERSATIONS[1], GREEDY)
    assert not llm.runner.caches
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "logits", lambda x: torch.full((len(x), 300), torch.nan))
        with pytest.raises(EngineError, match="not finite"):
            llm.chat(CONVERSATIONS[1], GREEDY)
    assert not llm.runner.caches and llm.scheduler.pool.num_free == llm.scheduler.pool.num_blocks


def test_a_picture_that_needs_too_much_memory_fails_its_own_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also beside a prompt that has more tokens in this step."""
    llm = fresh(max_step_tokens=150)
    long = [user("A long story. " * 14)]
    encode = llm.runner.shelf.encode

    def limited(slices: Any) -> None:
        if any(one.item.grid.h > 8 for one in slices):
            raise MemoryError
        encode(slices)

    monkeypatch.setattr(llm.runner.shelf, "encode", limited)
    beside, large = llm.chat([long, CONVERSATIONS[6]], GREEDY)
    assert large.finish_reason == "error" and "out of memory" in (large.error or "")
    assert_same(beside, fresh().chat(long, GREEDY)[0])


def test_a_sampler_that_finds_no_memory_fails_alone() -> None:
    """Trying again would draw twice for all that had drawn before it."""
    llm = fresh()
    params = replace(GREEDY, temperature=3.0, top_k=0, seed=5)
    before, bad = (
        llm.sequences(llm.processor(CONVERSATIONS[index]), params)[0] for index in (0, 1)
    )
    sample, attempts = bad.sampler.sample, iter(range(9))

    def failing(logits_V: torch.Tensor) -> Any:
        if next(attempts) == 2:
            raise MemoryError
        return sample(logits_V)

    bad.sampler.sample = failing
    for one in (before, bad):
        llm.scheduler.add(one)
    while llm.scheduler.has_work:
        llm.step()
    assert bad.finish_reason == "error" and isinstance(bad.error, CapacityError)
    assert tuple(before.token_ids) == alone(0, params).token_ids


def test_a_copy_is_still_made_from_a_row_whose_owner_is_gone() -> None:
    """Memory ran out for row 1, its owner failed, and row 2 waits for what it was to hold."""
    runner = fresh().runner
    runner.arrange(deque([Reserve(0, 64)]))
    runner.caches[0].k_LKZC.fill_(7.0)
    runner.caches[0].length = 64
    runner.arrange(
        deque([Reserve(1, 96), Copy(0, 1, 64), Reserve(2, 64), Copy(1, 2, 32), Free(1), Free(0)])
    )
    assert list(runner.caches) == [2]
    assert runner.caches[2].length == 32
    assert (runner.caches[2].k_LKZC[:, :, :32] == 7.0).all()


def test_what_nobody_waits_for_any_more_is_not_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = fresh().runner
    runner.arrange(deque([Reserve(0, 64)]))
    runner.caches[0].length = 64

    def out_of_memory(*_: object) -> None:
        raise MemoryError

    orders: deque[MemoryOrder] = deque([Reserve(1, 96), Copy(0, 1, 64)])
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_reserve", out_of_memory)
        with pytest.raises(MemoryError):
            runner.arrange(orders)
        assert len(orders) == 2
        orders.extend([Free(1), Free(0)])
        runner.arrange(orders)
    assert not runner.caches and not orders


@settings(max_examples=15, deadline=None)
@given(data=st.data(), cache=st.integers(320, 640), drafts=st.sampled_from([0, 4]))
def test_memory_that_runs_out_anywhere_changes_no_other_answer(
    data: st.DataObject, cache: int, drafts: int
) -> None:
    llm = fresh(cache_tokens=cache, max_step_tokens=64, max_step_patches=32, num_drafts=drafts)
    runner = llm.runner

    def failing(function: Any) -> Any:
        def attempt(*args: Any) -> Any:
            if data.draw(st.integers(0, 19)) == 19:
                raise MemoryError
            return function(*args)

        return attempt

    runner._reserve = failing(runner._reserve)
    runner._forward = failing(runner._forward)
    runner.shelf.encode = failing(runner.shelf.encode)
    order = data.draw(st.permutations(range(len(CONVERSATIONS))))
    for index, one in zip(order, llm.chat([CONVERSATIONS[i] for i in order], GREEDY), strict=True):
        if one.finish_reason == "error":
            assert "out of memory" in (one.error or "")
        else:
            assert_same(one, alone(index))
    assert llm.scheduler.pool.num_busy == 0
    assert not runner.shelf._holds


def test_an_error_keeps_no_tensors_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fresh()
    made: list[weakref.ref[torch.Tensor]] = []

    def forward(*_: object) -> None:
        large = torch.zeros(9)
        made.append(weakref.ref(large))
        raise MemoryError

    monkeypatch.setattr(llm.runner, "_forward", forward)
    with pytest.raises(CapacityError, match="out of memory") as caught:
        llm.chat(CONVERSATIONS[0], GREEDY)
    assert made[0]() is None
    assert caught.value.__cause__ is None


FILES = ("blocks.py", "plan.py", "scheduler.py", "runner.py", "llm.py", "shelf.py", "sequence.py")


def interrupt_after(lines: int) -> Any:
    """Make a tracer that lets Ctrl-C come at a line of the engine."""
    left = lines

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        left -= event == "line"
        if left > 0:
            return trace
        sys.settrace(None)
        raise KeyboardInterrupt

    return trace


def chat_until_interrupted(llm: LLM, rng: random.Random) -> None:
    sys.settrace(interrupt_after(rng.randrange(200, 6000)))
    try:
        while True:
            llm.chat([CONVERSATIONS[i] for i in rng.sample(range(6), 3)], GREEDY)
    finally:
        sys.settrace(None)


def test_an_interrupt_at_any_line_leaves_the_llm_ready() -> None:
    llm = fresh(cache_tokens=480, max_step_tokens=64, max_step_patches=32, num_drafts=3)
    rng = random.Random(0)
    for _ in range(30):
        with pytest.raises(KeyboardInterrupt):
            chat_until_interrupted(llm, rng)
        index = rng.randrange(6)
        assert_same(llm.chat(CONVERSATIONS[index], GREEDY)[0], alone(index))
        assert llm.scheduler.pool.num_busy == 0 and not llm.scheduler.has_work
        assert not llm.runner.shelf._holds
        assert set(llm.runner.caches) <= set(llm.scheduler.pool._resting)


def test_an_interrupt_of_the_model_keeps_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fresh()
    llm.chat(CONVERSATIONS[6], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner, "_forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llm.chat(CONVERSATIONS[6], GREEDY)
    (again,) = llm.chat(CONVERSATIONS[6], GREEDY)
    assert again.cached_tokens >= 96 and again.seconds.vision == 0
    assert_same(again, alone(6))


def test_forgetting_gives_memory_back_at_once() -> None:
    llm = fresh()
    llm.chat(CONVERSATIONS, GREEDY)
    assert llm.runner.caches
    llm.forget()
    assert not llm.runner.caches


def test_a_step_without_work_does_nothing() -> None:
    assert fresh().step() == []


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
