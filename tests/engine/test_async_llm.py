"""AsyncLLM: concurrent callers get the same outputs; aborts, failures and shutdown are clean."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.async_llm import AsyncLLM
from qwen2vl.errors import EngineError, InputError
from tests.engine.test_llm import random_image, user
from tests.engine.test_runner import (
    CONVERSATIONS,
    GREEDY,
    MODEL,
    assert_same_completion,
    reference_completion,
)
from tests.tiny import tiny_processor


@pytest.fixture
def engine() -> Iterator[AsyncLLM]:
    async_llm = AsyncLLM(LLM(MODEL, tiny_processor()))
    yield async_llm
    async_llm.close()


def test_concurrent_callers_get_the_outputs_of_sequential_ones(engine: AsyncLLM) -> None:
    async def chat_concurrently() -> list[Any]:
        return await asyncio.gather(*(engine.chat(one, GREEDY) for one in CONVERSATIONS))

    for index, (completion,) in enumerate(asyncio.run(chat_concurrently())):
        assert_same_completion(completion, reference_completion(index))


def test_deltas_are_streamed(engine: AsyncLLM) -> None:
    async def consume() -> tuple[str, list[Any], Any]:
        stream = await engine.stream([user("Hi")], GREEDY)
        deltas = [delta async for delta in stream]
        (completion,) = await stream.completions()
        return "".join(d.text for d in deltas), deltas, completion

    text, deltas, completion = asyncio.run(consume())
    assert text == completion.text
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"]
    assert completion.seconds.process > 0


def test_leaving_early_aborts(engine: AsyncLLM) -> None:
    async def leave() -> None:
        endless = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
        async for _ in await engine.stream([user("Hi")], endless):
            break
        await engine.chat([user("Hello")], GREEDY)  # so the engine has processed the abort

    asyncio.run(leave())
    assert not engine.llm.engine_core.scheduler.has_unfinished_requests
    assert engine.llm.engine_core.scheduler.pool.num_used_blocks == 0


def test_a_canceled_task_aborts_its_request(engine: AsyncLLM) -> None:
    async def give_up() -> None:
        endless = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.chat([user("Hi")], endless), 0.05)
        await engine.chat([user("Hello")], GREEDY)

    asyncio.run(give_up())
    assert not engine.llm.engine_core.scheduler.has_unfinished_requests


ENDLESS = SamplingParams(temperature=0, max_tokens=20_000, ignore_eos=True)


def test_completions_after_leaving_early_raise_aborted(engine: AsyncLLM) -> None:
    async def leave() -> None:
        stream = await engine.stream([user("Hi")], ENDLESS)
        async for _ in stream:
            break
        for _ in range(2):
            with pytest.raises(EngineError, match="was aborted"):
                await asyncio.wait_for(stream.completions(), 20)

    asyncio.run(leave())


def test_other_consumers_of_an_aborted_request_get_an_error(engine: AsyncLLM) -> None:
    async def consume_and_abort() -> None:
        stream = await engine.stream([user("Hi")], ENDLESS)
        consumer = asyncio.create_task(stream.completions())
        await asyncio.sleep(0.02)
        stream.abort()
        with pytest.raises(EngineError, match="was aborted"):
            await asyncio.wait_for(consumer, 20)

    asyncio.run(consume_and_abort())


def test_aborting_a_finished_request_does_nothing(engine: AsyncLLM) -> None:
    async def finish() -> Any:
        stream = await engine.stream([user("Hi")], GREEDY)
        before = await stream.completions()
        stream.abort()
        return before, await stream.completions()

    before, after = asyncio.run(finish())
    assert before[0].token_ids == after[0].token_ids == reference_completion(0).token_ids


def test_invalid_input_is_reported_to_its_caller_only(engine: AsyncLLM) -> None:
    async def both() -> list[Any]:
        bad = engine.chat([user("Hi")], SamplingParams(stop_token_ids=[10**6]))
        return await asyncio.gather(engine.chat([user("Hi")], GREEDY), bad, return_exceptions=True)

    good, bad = asyncio.run(both())
    assert_same_completion(good[0], reference_completion(0))
    assert isinstance(bad, InputError)


def test_several_samples_share_one_stream(engine: AsyncLLM) -> None:
    async def consume() -> Any:
        params = SamplingParams(temperature=2.0, n=3, seed=1, max_tokens=6, ignore_eos=True)
        stream = await engine.stream([user("Hi", random_image())], params)
        deltas = [delta async for delta in stream]
        return deltas, await stream.completions()

    deltas, completions = asyncio.run(consume())
    assert len(completions) == 3
    for index, completion in enumerate(completions):
        assert "".join(d.text for d in deltas if d.index == index) == completion.text


def test_a_dead_engine_reports_the_cause_and_stays_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncLLM(LLM(MODEL, tiny_processor()))
    monkeypatch.setattr(
        engine.llm.engine_core.runner,
        "_forward",
        lambda *_: (_ for _ in ()).throw(RuntimeError("shape")),
    )

    async def chat() -> None:
        await engine.chat([user("Hi")], GREEDY)

    for _ in range(2):
        with pytest.raises(EngineError, match="engine died: RuntimeError: shape"):
            asyncio.run(chat())
    assert not engine.is_alive


def test_closing_ends_running_requests() -> None:
    engine = AsyncLLM(LLM(MODEL, tiny_processor()))

    async def close() -> None:
        stream = await engine.stream([user("Hi")], SamplingParams(max_tokens=2000, ignore_eos=True))
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="closed"):
            await stream.completions()

    asyncio.run(close())
    assert not engine.llm.engine_core.scheduler.has_unfinished_requests
    assert engine.llm.engine_core.scheduler.pool.num_used_blocks == 0
    assert_same_completion(engine.llm.chat(CONVERSATIONS[0], GREEDY)[0], reference_completion(0))


def test_an_engine_closed_while_a_request_is_created_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = AsyncLLM(LLM(MODEL, tiny_processor()))
    create_requests = engine.llm.create_requests

    def closing(*args: Any) -> Any:
        engine.close()
        return create_requests(*args)

    monkeypatch.setattr(engine.llm, "create_requests", closing)
    for _ in range(2):
        with pytest.raises(EngineError, match="closed"):
            asyncio.run(asyncio.wait_for(engine.chat([user("Hi")], GREEDY), 20))
    assert engine._input_queue.qsize() <= 1
