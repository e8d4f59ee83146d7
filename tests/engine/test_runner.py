"""The whole engine: any batch, limit, cache state or failure gives each request its own output.

The reference is the request alone in a new engine, in float32.
"""

from __future__ import annotations

import random
import sys
import weakref
from collections import deque
from collections.abc import Callable
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
from qwen2vl.engine.kv_cache.block_pool import CacheOperation, CopySlots, FreeSlots, ReserveSlots
from qwen2vl.engine.kv_cache.storage import KVStorage
from qwen2vl.engine.outputs import Completion, Delta
from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.errors import CapacityError, EngineError, InputError
from tests.engine.test_llm import random_image, random_video, user
from tests.parity.reference import random_model
from tests.tiny import tiny_config, tiny_processor

MODEL = random_model(tiny_config(tie_word_embeddings=False))
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [user("Hi")],
    [user("What is this?", random_image())],
    [user("What is this?", random_image(seed=1))],  # the same ids, other pixels
    [user("And these?", random_image(84, 56), random_image(140, 140, seed=2))],
    [user("What moves?", random_video(8))],
    [user("Both?", random_video(4), random_image())],
    [user("A longer question about a larger picture, please.", random_image(224, 196, seed=3))],
    [user("What is this?", random_image())],  # again
]


def new_llm(**engine: Any) -> LLM:
    return LLM(MODEL, tiny_processor(), engine=EngineConfig(**engine))


def logprobs(completion: Completion) -> list[float]:
    return [entry.logprob for entry in completion.logprobs or ()]


@lru_cache
def reference_completion(index: int, params: SamplingParams = GREEDY) -> Completion:
    """Reference: the conversation alone in a new engine."""
    return new_llm().chat(CONVERSATIONS[index], params)[0]


def assert_same_completion(got: Completion, want: Completion) -> None:
    assert got.token_ids == want.token_ids
    np.testing.assert_allclose(logprobs(got), logprobs(want), rtol=0, atol=2e-5)


def test_the_conversations_differ() -> None:
    """All but the repeated one differ by much more than the tolerance of the tests."""
    all_logprobs = [
        logprobs(reference_completion(index)) for index in range(len(CONVERSATIONS) - 1)
    ]
    for one, other in combinations(all_logprobs, 2):
        assert np.abs(np.subtract(one, other)).max() > 1e-3


# Small enough that chunks end anywhere and requests are preempted.
ENGINE_LIMITS: dict[str, st.SearchStrategy[Any]] = {
    "max_num_batched_tokens": st.integers(32, 90),
    "max_num_encoder_patches": st.integers(4, 90),
    "max_num_seqs": st.integers(1, 4),
    "kv_cache_tokens": st.integers(320, 640),
    "order": st.permutations(range(len(CONVERSATIONS))),
}


def test_batched_equals_alone() -> None:
    for index, completion in enumerate(new_llm().chat(CONVERSATIONS, GREEDY)):
        assert_same_completion(completion, reference_completion(index))


@settings(max_examples=12, deadline=None)
@given(**ENGINE_LIMITS)
def test_step_limits_do_not_change_the_output(
    max_num_batched_tokens: int,
    max_num_encoder_patches: int,
    max_num_seqs: int,
    kv_cache_tokens: int,
    order: list[int],
) -> None:
    """Chunks end inside images, videos are encoded in parts, requests are preempted and resume."""
    llm = new_llm(
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_encoder_patches=max_num_encoder_patches,
        max_num_seqs=max_num_seqs,
        kv_cache_tokens=kv_cache_tokens,
        encoder_cache_bytes=0,
    )
    for index, completion in zip(
        order, llm.chat([CONVERSATIONS[i] for i in order], GREEDY), strict=True
    ):
        assert_same_completion(completion, reference_completion(index))
    assert llm.engine_core.scheduler.pool.num_used_blocks == 0


def test_a_preempted_request_resumes_with_the_same_output() -> None:
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, logprobs=0)
    llm = new_llm(kv_cache_tokens=320)
    num_generated: list[int] = []
    stop_running = llm.engine_core.scheduler._stop_running

    def watched(request: Any, **kwargs: Any) -> None:
        if request.finish_reason is None:
            num_generated.append(len(request.output_token_ids))
        stop_running(request, **kwargs)

    llm.engine_core.scheduler._stop_running = watched
    for index, completion in enumerate(llm.chat(CONVERSATIONS[:3], params)):
        assert_same_completion(completion, reference_completion(index, params))
    assert max(num_generated) > 10  # one was preempted during decode


def test_a_second_turn_reuses_the_prefix_of_the_first() -> None:
    llm = new_llm()
    (first,) = llm.chat([user("What is this, and what stands beside it?", random_image())], GREEDY)
    assert first.cached_tokens == 0
    conversation = [
        user("What is this, and what stands beside it?", random_image()),
        {"role": "assistant", "content": "A square."},
        user("Why?"),
    ]
    (second,) = llm.chat(conversation, GREEDY)
    assert second.cached_tokens >= first.prompt_tokens - 64
    assert second.seconds.vision == 0
    assert_same_completion(second, new_llm().chat(conversation, GREEDY)[0])


def test_images_with_equal_ids_do_not_share_cache_blocks() -> None:
    llm = new_llm()
    llm.chat(CONVERSATIONS[1], GREEDY)
    (other,) = llm.chat(CONVERSATIONS[2], GREEDY)
    assert_same_completion(other, reference_completion(2))
    assert other.cached_tokens == 32  # of the system message


def test_a_cached_image_is_not_encoded_again_even_after_a_restart(tmp_path: Path) -> None:
    conversation = [user("What is this?", random_image())]
    (cold,) = new_llm(encoder_cache_dir=tmp_path).chat(conversation, GREEDY)
    llm = new_llm(encoder_cache_dir=tmp_path)
    llm.model.encode = None  # type: ignore[assignment]
    try:
        (warm,) = llm.chat(conversation, GREEDY)
    finally:
        del llm.model.encode
    assert_same_completion(warm, cold)
    assert warm.seconds.vision == 0


def test_samples_share_their_prefix_and_differ() -> None:
    params = replace(GREEDY, temperature=3.0, top_k=0, n=3, seed=5)
    conversation = [user("Tell me a rather long story about this picture.", random_image(112, 112))]
    llm = new_llm()
    completions = llm.chat(conversation, params)
    assert len({one.token_ids for one in completions}) == 3
    assert [c.cached_tokens > 32 for c in completions] == [False, True, True]
    for sample, one in enumerate(completions):
        assert_same_completion(
            one, new_llm().chat(conversation, replace(params, n=1, seed=5 + sample))[0]
        )


def test_an_aborted_request_releases_everything() -> None:
    llm = new_llm()
    prompt = llm.processor([user("Hi", random_image())])
    kept, aborted = llm.create_requests(prompt, GREEDY) + llm.create_requests(prompt, GREEDY)
    for one in (kept, aborted):
        llm.engine_core.scheduler.add_request(one)
    for _ in range(3):
        llm.step()
    llm.abort(aborted)
    llm.abort(aborted)  # a second time does nothing
    while llm.engine_core.scheduler.has_unfinished_requests:
        llm.step()
    assert len(kept.output_token_ids) == 8 and aborted.finish_reason is None
    assert llm.engine_core.scheduler.pool.num_used_blocks == 0
    llm.reset_caches()
    assert (
        llm.engine_core.scheduler.pool.num_free_blocks == llm.engine_core.scheduler.pool.num_blocks
    )


def test_a_request_that_needs_too_much_memory_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = new_llm()
    forward = llm.engine_core.runner._forward

    def limited(chunks: Any) -> torch.Tensor:
        if sum(len(chunk.input_ids) for chunk in chunks) > 60:
            raise MemoryError
        return forward(chunks)

    monkeypatch.setattr(llm.engine_core.runner, "_forward", limited)
    large, small = llm.chat([CONVERSATIONS[6], CONVERSATIONS[0]], GREEDY)
    assert large.finish_reason == "error" and "out of memory" in (large.error or "")
    assert_same_completion(small, reference_completion(0))


class FailingStorage:
    """A KV storage with another `reserve`."""

    def __init__(self, storage: KVStorage, reserve: Callable[..., Any]) -> None:
        self.reserve = reserve
        self.batch = storage.batch


def test_cached_blocks_are_evicted_before_a_request_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = new_llm()
    runner, num_failures = llm.engine_core.runner, 0
    reserve = runner.kv_storage.reserve

    def limited(old: Any, num_tokens: int, in_use: Any) -> Any:
        nonlocal num_failures
        if sum(cache.capacity for cache in runner.caches.values()) + num_tokens > 320:
            num_failures += 1
            raise MemoryError
        return reserve(old, num_tokens, in_use)

    monkeypatch.setattr(runner, "kv_storage", FailingStorage(runner.kv_storage, limited))
    for index in (*range(len(CONVERSATIONS)), *range(len(CONVERSATIONS))):
        assert_same_completion(
            llm.chat(CONVERSATIONS[index], GREEDY)[0], reference_completion(index)
        )
    assert num_failures > 2


def test_cached_vision_embeddings_are_evicted_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = new_llm()
    cache = llm.engine_core.runner.encoder_cache.cache
    llm.chat(CONVERSATIONS[1], GREEDY)
    assert cache.stats.num_bytes
    llm.engine_core.scheduler.reset_prefix_cache()
    encode = llm.model.encode

    def limited(*given: Any) -> torch.Tensor:
        if cache.stats.num_bytes:
            raise MemoryError
        return encode(*given)

    monkeypatch.setattr(llm.model, "encode", limited)
    assert_same_completion(llm.chat(CONVERSATIONS[2], GREEDY)[0], reference_completion(2))


def test_a_failed_request_holds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = new_llm()
    with monkeypatch.context() as patch:
        patch.setattr(
            llm.engine_core.runner, "_forward", lambda *_: (_ for _ in ()).throw(MemoryError)
        )
        with pytest.raises(CapacityError):
            llm.chat(CONVERSATIONS[1], GREEDY)
    assert not llm.engine_core.runner.caches
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "logits", lambda x: torch.full((len(x), 300), torch.nan))
        with pytest.raises(EngineError, match="not finite"):
            llm.chat(CONVERSATIONS[1], GREEDY)
    assert (
        not llm.engine_core.runner.caches
        and llm.engine_core.scheduler.pool.num_free_blocks
        == llm.engine_core.scheduler.pool.num_blocks
    )


def test_an_image_that_needs_too_much_memory_fails_its_own_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even beside a prompt that has more tokens in this step."""
    llm = new_llm(max_num_batched_tokens=150)
    long = [user("A long story. " * 14)]
    encode = llm.engine_core.runner.encoder_cache.encode

    def limited(inputs: Any) -> None:
        if any(one.item.grid.h > 8 for one in inputs):
            raise MemoryError
        encode(inputs)

    monkeypatch.setattr(llm.engine_core.runner.encoder_cache, "encode", limited)
    beside, large = llm.chat([long, CONVERSATIONS[6]], GREEDY)
    assert large.finish_reason == "error" and "out of memory" in (large.error or "")
    assert_same_completion(beside, new_llm().chat(long, GREEDY)[0])


def test_a_sampler_that_runs_out_of_memory_fails_alone() -> None:
    """A retry of the step would draw twice for the requests sampled before it."""
    llm = new_llm()
    params = replace(GREEDY, temperature=3.0, top_k=0, seed=5)
    before, bad = (
        llm.create_requests(llm.processor(CONVERSATIONS[index]), params)[0] for index in (0, 1)
    )
    sample, attempts = bad.sampler.sample, iter(range(9))

    def failing(logits_V: torch.Tensor) -> Any:
        if next(attempts) == 2:
            raise MemoryError
        return sample(logits_V)

    bad.sampler.sample = failing
    for one in (before, bad):
        llm.engine_core.scheduler.add_request(one)
    while llm.engine_core.scheduler.has_unfinished_requests:
        llm.step()
    assert bad.finish_reason == "error" and isinstance(bad.error, CapacityError)
    assert tuple(before.output_token_ids) == reference_completion(0, params).token_ids


def test_a_copy_is_made_from_an_allocation_whose_request_failed() -> None:
    """Allocation 1 ran out of memory, its request failed, and allocation 2 copies from it."""
    runner = new_llm().engine_core.runner
    runner.apply_cache_operations(deque([ReserveSlots(0, 64)]))
    runner.caches[0].k_LKZC.fill_(7.0)
    runner.caches[0].length = 64
    runner.apply_cache_operations(
        deque(
            [
                ReserveSlots(1, 96),
                CopySlots(0, 1, 64),
                ReserveSlots(2, 64),
                CopySlots(1, 2, 32),
                FreeSlots(1),
                FreeSlots(0),
            ]
        )
    )
    assert list(runner.caches) == [2]
    assert runner.caches[2].length == 32
    assert (runner.caches[2].k_LKZC[:, :, :32] == 7.0).all()


def test_allocations_that_are_no_longer_needed_are_not_reserved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = new_llm().engine_core.runner
    runner.apply_cache_operations(deque([ReserveSlots(0, 64)]))
    runner.caches[0].length = 64

    def out_of_memory(*_: object) -> None:
        raise MemoryError

    cache_operations: deque[CacheOperation] = deque([ReserveSlots(1, 96), CopySlots(0, 1, 64)])
    with monkeypatch.context() as patch:
        patch.setattr(runner, "kv_storage", FailingStorage(runner.kv_storage, out_of_memory))
        with pytest.raises(MemoryError):
            runner.apply_cache_operations(cache_operations)
        assert len(cache_operations) == 2
        cache_operations.extend([FreeSlots(1), FreeSlots(0)])
        runner.apply_cache_operations(cache_operations)
    assert not runner.caches and not cache_operations


@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    kv_cache_tokens=st.integers(320, 640),
    num_speculative_tokens=st.sampled_from([0, 4]),
)
def test_out_of_memory_anywhere_does_not_change_other_outputs(
    data: st.DataObject, kv_cache_tokens: int, num_speculative_tokens: int
) -> None:
    llm = new_llm(
        kv_cache_tokens=kv_cache_tokens,
        max_num_batched_tokens=64,
        max_num_encoder_patches=32,
        num_speculative_tokens=num_speculative_tokens,
    )
    runner = llm.engine_core.runner

    def failing(function: Any) -> Any:
        def attempt(*args: Any) -> Any:
            if data.draw(st.integers(0, 19)) == 19:
                raise MemoryError
            return function(*args)

        return attempt

    reserve = failing(runner.kv_storage.reserve)
    runner.kv_storage = FailingStorage(runner.kv_storage, reserve)
    runner._forward = failing(runner._forward)
    runner.encoder_cache.encode = failing(runner.encoder_cache.encode)
    order = data.draw(st.permutations(range(len(CONVERSATIONS))))
    for index, completion in zip(
        order, llm.chat([CONVERSATIONS[i] for i in order], GREEDY), strict=True
    ):
        if completion.finish_reason == "error":
            assert "out of memory" in (completion.error or "")
        else:
            assert_same_completion(completion, reference_completion(index))
    assert llm.engine_core.scheduler.pool.num_used_blocks == 0
    assert not runner.encoder_cache._num_references


def test_an_error_keeps_no_tensors_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = new_llm()
    references: list[weakref.ref[torch.Tensor]] = []

    def forward(*_: object) -> None:
        large = torch.zeros(9)
        references.append(weakref.ref(large))
        raise MemoryError

    monkeypatch.setattr(llm.engine_core.runner, "_forward", forward)
    with pytest.raises(CapacityError, match="out of memory") as caught:
        llm.chat(CONVERSATIONS[0], GREEDY)
    assert references[0]() is None
    assert caught.value.__cause__ is None


FILES = (
    "block_pool.py",
    "output.py",
    "scheduler.py",
    "runner.py",
    "engine_core.py",
    "llm.py",
    "manager.py",
    "request.py",
)


def interrupt_after(lines: int) -> Any:
    """Return a trace function that raises KeyboardInterrupt after so many lines of the engine."""
    remaining = lines

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal remaining
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        remaining -= event == "line"
        if remaining > 0:
            return trace
        sys.settrace(None)
        raise KeyboardInterrupt

    return trace


def chat_until_interrupted(llm: LLM, rng: random.Random) -> None:
    previous = sys.gettrace()  # of coverage, which would measure no later test of this process
    sys.settrace(interrupt_after(rng.randrange(200, 6000)))
    try:
        while True:
            llm.chat([CONVERSATIONS[i] for i in rng.sample(range(6), 3)], GREEDY)
    finally:
        sys.settrace(previous)


def test_the_llm_is_usable_after_an_interrupt_at_any_line() -> None:
    llm = new_llm(
        kv_cache_tokens=480,
        max_num_batched_tokens=64,
        max_num_encoder_patches=32,
        num_speculative_tokens=3,
    )
    rng = random.Random(0)
    for _ in range(30):
        with pytest.raises(KeyboardInterrupt):
            chat_until_interrupted(llm, rng)
        index = rng.randrange(6)
        assert_same_completion(
            llm.chat(CONVERSATIONS[index], GREEDY)[0], reference_completion(index)
        )
        assert (
            llm.engine_core.scheduler.pool.num_used_blocks == 0
            and not llm.engine_core.scheduler.has_unfinished_requests
        )
        assert not llm.engine_core.runner.encoder_cache._num_references
        assert set(llm.engine_core.runner.caches) <= set(llm.engine_core.scheduler.pool._evictable)


def test_an_interrupt_between_steps_keeps_the_prefix_cache() -> None:
    llm = new_llm()

    def interrupt(_: Delta) -> None:
        raise KeyboardInterrupt

    core = llm.engine_core
    with pytest.raises(KeyboardInterrupt):
        llm.chat(CONVERSATIONS[6], GREEDY, on_delta=interrupt)
    assert llm.engine_core is core and not core.scheduler.has_unfinished_requests
    (again,) = llm.chat(CONVERSATIONS[6], GREEDY)
    assert again.cached_tokens >= 96 and again.seconds.vision == 0
    assert_same_completion(again, reference_completion(6))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("shape")])
@pytest.mark.parametrize("where", ["_forward", "_encode", "apply_cache_operations"])
def test_an_interrupt_or_error_inside_a_step_replaces_the_engine_core(
    monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException | type[BaseException]
) -> None:
    llm = new_llm()
    core = llm.engine_core
    monkeypatch.setattr(core.runner, where, lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        llm.chat(CONVERSATIONS[6], GREEDY)
    assert llm.engine_core is not core and not llm.has_unfinished_requests
    (again,) = llm.chat(CONVERSATIONS[6], GREEDY)
    assert again.cached_tokens == 0
    assert_same_completion(again, reference_completion(6))


def test_reset_caches_frees_memory_immediately() -> None:
    llm = new_llm()
    llm.chat(CONVERSATIONS, GREEDY)
    assert llm.engine_core.runner.caches
    llm.reset_caches()
    assert not llm.engine_core.runner.caches


def test_a_step_without_work_does_nothing() -> None:
    assert new_llm().step() == []


@pytest.mark.parametrize("num_speculative_tokens", [0, 6])
def test_a_grammar_constrains_only_its_own_request(num_speculative_tokens: int) -> None:
    pytest.importorskip("llguidance")
    constrained = SamplingParams(
        temperature=0, grammar=Grammar.choice(["a red square", "a blue star"])
    )
    llm = new_llm(num_speculative_tokens=num_speculative_tokens)
    unconstrained, bound, again = llm.chat(
        [CONVERSATIONS[1], CONVERSATIONS[1], CONVERSATIONS[0]], [GREEDY, constrained, GREEDY]
    )
    assert bound.text in ("a red square", "a blue star")
    assert bound.finish_reason == "stop"
    assert_same_completion(unconstrained, reference_completion(1))
    assert_same_completion(again, reference_completion(0))


def test_an_invalid_grammar_is_rejected_before_anything_is_computed() -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(InputError, match="regex"):
        new_llm().chat(CONVERSATIONS[0], SamplingParams(grammar=Grammar.regex("(")))
