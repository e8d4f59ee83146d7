"""The engine thread: embeddings between steps, statistics, time in a step, and logits with NaN."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from qwen2vl.engine import AsyncLLM, EngineStats, SamplingParams
from qwen2vl.engine.stats import EngineCounters
from qwen2vl.errors import CapacityError, EngineError, InputError
from tests.engine.test_async_llm import ENDLESS, fail_with
from tests.engine.test_runner import (
    CONVERSATIONS,
    GREEDY,
    assert_same_completion,
    new_llm,
    reference_completion,
)

MINUTE = 60.0


@pytest.fixture
def engine() -> Iterator[AsyncLLM]:
    async_llm = AsyncLLM(new_llm(max_num_batched_tokens=100))
    yield async_llm
    async_llm.close()


def prompts(engine: AsyncLLM, *indices: int) -> list[Any]:
    return [engine.llm.processor(CONVERSATIONS[index]) for index in indices]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MINUTE
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.001)


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_equal_those_of_the_llm(engine: AsyncLLM, pooling: Any) -> None:
    want = new_llm(max_num_batched_tokens=100).embed(CONVERSATIONS, pooling=pooling)
    got = asyncio.run(engine.embed(prompts(engine, *range(len(CONVERSATIONS))), pooling=pooling))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert asyncio.run(engine.embed([])).shape == (0, want.shape[1])


def test_embedding_runs_between_the_steps_of_other_requests(engine: AsyncLLM) -> None:
    async def both() -> Any:
        chats = [engine.chat(CONVERSATIONS[index], GREEDY) for index in (0, 1, 6)]
        embeds = [engine.embed(prompts(engine, index)) for index in (1, 2, 4)]
        return await asyncio.gather(*chats, *embeds)

    *completions, first, second, third = asyncio.run(both())
    for index, (completion,) in zip((0, 1, 6), completions, strict=True):
        assert_same_completion(completion, reference_completion(index))
    want = new_llm().embed([CONVERSATIONS[index] for index in (1, 2, 4)])
    torch.testing.assert_close(torch.cat([first, second, third]), want, rtol=0, atol=1e-5)


def test_a_step_runs_between_two_embeddings(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    core, llm = engine.llm.engine_core, engine.llm
    step, embed = core.step, llm.embed_prompts

    def watched_embed(*given: Any, **options: Any) -> Any:
        events.append("embed")
        return embed(*given, **options)

    monkeypatch.setattr(core, "step", lambda: (events.append("step"), step())[1])
    monkeypatch.setattr(llm, "embed_prompts", watched_embed)

    async def run() -> None:
        stream = await engine.stream("Hi", ENDLESS)
        async for _ in stream:
            await asyncio.gather(*(engine.embed(prompts(engine, 0)) for _ in range(8)))
            break

    asyncio.run(run())
    joined = " ".join(events)
    assert events.count("embed") == 8 and "embed embed" not in joined


def test_wrong_prompts_and_options_of_embed_are_named(engine: AsyncLLM) -> None:
    good = prompts(engine, 0)[0]
    long = engine.llm.processor.from_text("a" * 40_000)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([good, long], {}, CapacityError, r"^prompts\[1\]: the prompt has 40,000"),
        ([good], {"adapter": "x"}, InputError, r"^prompts\[0\]: adapter 'x'"),
        ([good], {"pooling": "max"}, InputError, "pooling: got 'max'"),
    ]
    for given, options, error, text in cases:
        with pytest.raises(error, match=text):
            asyncio.run(engine.embed(given, **options))
    assert engine.is_alive


def test_a_failed_embedding_concerns_its_caller_only(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> Any:
        chat = asyncio.create_task(engine.chat(CONVERSATIONS[0], GREEDY))
        with pytest.raises(EngineError, match=r"embedding failed in this request only.*KeyError"):
            await engine.embed(prompts(engine, 0))
        return await chat

    monkeypatch.setattr(engine.llm, "embed_prompts", failing(KeyError("bug")))
    (completion,) = asyncio.run(run())
    assert_same_completion(completion, reference_completion(0))
    monkeypatch.setattr(engine.llm, "embed_prompts", failing(CapacityError("too large")))
    with pytest.raises(CapacityError, match="too large"):
        asyncio.run(engine.embed(prompts(engine, 0)))
    assert engine.is_alive


def test_embeddings_that_are_not_finite_are_refused(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine.llm.model.forward

    def broken(*given: Any, **options: Any) -> Any:
        return forward(*given, **options).fill_(torch.nan)

    monkeypatch.setattr(engine.llm.model, "forward", broken)
    with pytest.raises(EngineError, match="hidden states are not finite"):
        asyncio.run(engine.embed(prompts(engine, 0)))
    assert engine.is_alive


def test_a_canceled_embedding_ends_after_its_current_batch(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, proceed, batches = threading.Event(), threading.Event(), []
    embed = engine.llm.embed_prompts

    def slow(batch: Any, *given: Any, **options: Any) -> Any:
        batches.append(batch)
        started.set()
        proceed.wait(MINUTE)
        return embed(batch, *given, **options)

    monkeypatch.setattr(engine.llm, "embed_prompts", slow)

    async def run() -> Any:
        many = asyncio.create_task(engine.embed(prompts(engine, 6, 6, 6)))
        await asyncio.to_thread(started.wait, MINUTE)
        queued = asyncio.create_task(engine.embed(prompts(engine, 0)))
        await asyncio.sleep(0)
        assert engine.seconds_in_step > 0
        for task in (many, queued):
            task.cancel()
        results = await asyncio.gather(many, queued, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        proceed.set()
        return await engine.chat(CONVERSATIONS[0], GREEDY)

    (completion,) = asyncio.run(run())
    assert_same_completion(completion, reference_completion(0))
    assert len(batches) == 1


@pytest.mark.parametrize("end", ["death", "close"])
def test_embeddings_end_with_the_engine(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    started, proceed = threading.Event(), threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        started.set()
        proceed.wait(MINUTE)
        raise KeyboardInterrupt if end == "death" else CapacityError("ended")

    monkeypatch.setattr(engine.llm, "embed_prompts", hang)

    async def run() -> list[Any]:
        tasks = [asyncio.create_task(engine.embed(prompts(engine, 0))) for _ in range(2)]
        await asyncio.to_thread(started.wait, MINUTE)
        closing = asyncio.create_task(asyncio.to_thread(engine.close)) if end == "close" else None
        await asyncio.sleep(0)
        proceed.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        if closing is not None:
            await closing
        return results

    first, second = asyncio.run(run())
    wait_until(lambda: not engine.is_alive)
    assert engine.seconds_in_step == 0.0
    assert isinstance(second, (EngineError, CapacityError))
    if end == "death":
        for error in (first, second):
            assert isinstance(error, EngineError) and "KeyboardInterrupt" in str(error)
    engine.restart()
    assert_same_completion(
        asyncio.run(engine.chat(CONVERSATIONS[0], GREEDY))[0], reference_completion(0)
    )


def test_seconds_in_step_grow_while_a_step_hangs_and_are_zero_when_idle(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    proceed = threading.Event()
    core = engine.llm.engine_core
    step = core.step
    monkeypatch.setattr(core, "step", lambda: (proceed.wait(MINUTE), step())[1])
    assert engine.seconds_in_step == 0.0

    async def run() -> None:
        chat = asyncio.create_task(engine.chat("Hi", GREEDY))
        await asyncio.to_thread(wait_until, lambda: engine.seconds_in_step > 0)
        before = engine.seconds_in_step
        await asyncio.to_thread(wait_until, lambda: engine.seconds_in_step > before)
        assert engine.stats().num_running + engine.stats().num_waiting == 1
        proceed.set()
        await chat

    asyncio.run(run())
    wait_until(lambda: engine.seconds_in_step == 0.0)


def test_statistics_count_requests_tokens_and_images(engine: AsyncLLM) -> None:
    def chat(index: int) -> Any:
        return asyncio.run(engine.chat(CONVERSATIONS[index], GREEDY))[0]

    assert engine.stats() == EngineStats()
    assert engine.llm.kv_cache_tokens >= engine.llm.max_model_len
    first = chat(6)
    stats = engine.stats()
    assert stats.prefix_cache_queries == first.prompt_tokens and stats.prefix_cache_hits == 0
    assert (stats.encoder_cache_queries, stats.encoder_cache_hits) == (1, 0)
    assert stats.encoder_cache_bytes > 0 and stats.item_cache_bytes > 0
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    second = chat(6)
    stats = engine.stats()
    assert stats.prefix_cache_queries == 2 * first.prompt_tokens
    assert stats.prefix_cache_hits == second.cached_tokens > 0
    engine.llm.engine_core.scheduler.reset_prefix_cache()
    chat(6)
    assert engine.stats().encoder_cache_hits > 0


def test_statistics_of_running_and_waiting_requests() -> None:
    engine = AsyncLLM(new_llm(max_num_seqs=2))
    prepared = [engine.llm.prepare(CONVERSATIONS[index], ENDLESS) for index in (0, 1, 2)]

    async def run() -> None:
        streams = [engine.stream_prepared(one) for one in prepared]
        async for _ in streams[1]:
            break
        await asyncio.to_thread(wait_until, lambda: engine.stats().num_running == 2)
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting) == (2, 1)
        assert 0 < stats.kv_cache_usage <= 1
        for stream in streams:
            stream.abort()

    asyncio.run(run())
    wait_until(lambda: engine.stats().num_running == 0)
    assert engine.stats().kv_cache_usage == 0
    engine.close()


def test_totals_survive_the_death_of_the_core(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(engine.chat(CONVERSATIONS[1], GREEDY))
    before = engine.stats()
    monkeypatch.setattr(engine.llm.engine_core.runner, "_forward", fail_with(RuntimeError("x")))
    with pytest.raises(EngineError, match="engine died"):
        asyncio.run(engine.chat(CONVERSATIONS[1], GREEDY))
    dead = engine.stats()
    assert (dead.num_running, dead.num_waiting, dead.kv_cache_usage) == (0, 0, 0.0)
    engine.restart()
    asyncio.run(engine.chat(CONVERSATIONS[1], GREEDY))
    after = engine.stats()
    for name in asdict(EngineCounters()):
        assert getattr(before, name) <= getattr(dead, name) <= getattr(after, name)
    assert after.prefix_cache_queries > before.prefix_cache_queries


def test_preemptions_are_counted() -> None:
    llm = new_llm(kv_cache_tokens=320)
    llm.chat(CONVERSATIONS[:3], SamplingParams(temperature=0, max_tokens=150, ignore_eos=True))
    assert llm.stats().num_preemptions > 0


def test_draft_tokens_are_counted() -> None:
    llm = new_llm(num_speculative_tokens=4)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    llm.chat([CONVERSATIONS[1], CONVERSATIONS[1]], params)
    llm.chat(CONVERSATIONS[1], params)
    stats = llm.stats()
    assert stats.num_draft_tokens >= stats.num_accepted_tokens > 0


def test_a_row_of_logits_with_nan_fails_its_request_only(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks and embeddings are not reused: they may be where the damage is.

    The others share the first block of its prompt, and copy it before there are logits.
    """
    encoder_cache = engine.llm.engine_core.encoder_cache
    encode = encoder_cache.encode
    victim = engine.llm.prepare(CONVERSATIONS[6], GREEDY)

    def damaged(inputs: Any) -> None:
        encode(inputs)
        for one in inputs:
            if one.digest in victim.prompt.items[0].pair_digests:
                encoder_cache.embeddings(one.digest).fill_(torch.nan)

    async def chat_concurrently() -> list[Any]:
        stream = engine.stream_prepared(victim, final_only=True)
        chats = [engine.chat(CONVERSATIONS[index], GREEDY) for index in (0, 1, 4)]
        return await asyncio.gather(*chats, stream.completions(), return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(encoder_cache, "encode", damaged)
        *good, bad = asyncio.run(chat_concurrently())
    for index, (completion,) in zip((0, 1, 4), good, strict=True):
        assert_same_completion(completion, reference_completion(index))
    assert isinstance(bad, EngineError) and "logits are not finite" in str(bad)
    assert engine.is_alive
    (again,) = asyncio.run(engine.chat(CONVERSATIONS[6], GREEDY))
    assert again.cached_tokens == 32  # the block that the others have computed again
    assert_same_completion(again, reference_completion(6))


def test_damaged_blocks_of_an_aborted_prefill_are_computed_again(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The aborted request had no logits that could show the damage."""
    llm = engine.llm
    engine.close()
    forward = llm.engine_core.runner._forward
    monkeypatch.setattr(
        llm.engine_core.runner, "_forward", lambda chunks: _damage(llm, forward(chunks))
    )
    (request,) = llm.create_requests(llm.processor(CONVERSATIONS[6]), GREEDY)
    llm.add_request(request)
    llm.step()
    assert request.is_prefilling and request.num_computed_tokens >= 32
    llm.abort(request)
    monkeypatch.undo()
    # One shares the first block; the other shares all, of which only the first is there again.
    for index, cached_tokens in ((0, 0), (6, 32)):
        (completion,) = llm.chat(CONVERSATIONS[index], GREEDY)
        assert_same_completion(completion, reference_completion(index))
        assert completion.cached_tokens == cached_tokens
    (completion,) = llm.chat(CONVERSATIONS[6], GREEDY)
    assert_same_completion(completion, reference_completion(6))


def _damage(llm: Any, hidden_TD: Any) -> Any:
    for cache in llm.engine_core.runner.caches.values():
        cache.v_LKZC.fill_(torch.nan)
    return hidden_TD
