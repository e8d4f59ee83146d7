"""Prepared requests of AsyncLLM: the deltas of a sample join to its completion, however sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from qwen2vl.engine import AsyncLLM, Completion, Delta, PreparedRequest, SamplingParams
from qwen2vl.errors import EngineError
from tests.engine.test_async_llm import fail_with
from tests.engine.test_runner import (
    CONVERSATIONS,
    GREEDY,
    assert_same_completion,
    new_llm,
    reference_completion,
)

SAMPLES = SamplingParams(temperature=2.0, n=3, seed=1, max_tokens=9, ignore_eos=True, logprobs=2)


@pytest.fixture
def engine() -> Iterator[AsyncLLM]:
    async_llm = AsyncLLM(new_llm())
    yield async_llm
    async_llm.close()


async def consume(
    engine: AsyncLLM, prepared: PreparedRequest, *, final_only: bool = False
) -> tuple[list[Delta], list[Completion]]:
    stream = engine.stream_prepared(prepared, final_only=final_only)
    return [delta async for delta in stream], await stream.completions()


@pytest.mark.parametrize("final_only", [False, True])
@pytest.mark.parametrize("params", [SAMPLES, replace(SAMPLES, logprobs=None, stop=("e", "ab"))])
def test_the_deltas_of_a_sample_join_to_its_completion(
    engine: AsyncLLM, params: SamplingParams, final_only: bool
) -> None:
    prepared = engine.llm.prepare(CONVERSATIONS[1], params)
    deltas, completions = asyncio.run(consume(engine, prepared, final_only=final_only))
    assert len(completions) == 3
    for index, completion in enumerate(completions):
        own = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in own) == completion.text
        assert tuple(t for delta in own for t in delta.token_ids) == completion.token_ids
        assert tuple(p for delta in own for p in delta.logprobs) == (completion.logprobs or ())
        assert [delta.finish_reason for delta in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == completion.finish_reason
        assert len(own) == 1 if final_only else len(own) > 1 or completion.finish_reason == "stop"


def test_sync_streams_report_the_same_tokens(engine: AsyncLLM) -> None:
    stream = new_llm().stream(CONVERSATIONS[0], GREEDY)
    token_ids = tuple(token for delta in stream for token in delta.token_ids)
    assert token_ids == reference_completion(0).token_ids


@pytest.mark.parametrize("final_only", [False, True])
def test_concurrent_prepared_requests_equal_each_alone(engine: AsyncLLM, final_only: bool) -> None:
    prepared = [engine.llm.prepare(one, GREEDY) for one in CONVERSATIONS]

    async def run() -> list[Any]:
        calls = [consume(engine, one, final_only=final_only) for one in prepared]
        return await asyncio.gather(*calls)

    for index, (_, (completion,)) in enumerate(asyncio.run(run())):
        assert_same_completion(completion, reference_completion(index))


def test_the_loop_is_woken_once_a_step_and_by_final_deltas_only(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = [engine.llm.prepare(CONVERSATIONS[0], GREEDY) for _ in range(6)]
    steps: list[int] = []
    step = engine.llm.engine_core.step
    monkeypatch.setattr(engine.llm.engine_core, "step", lambda: (steps.append(1), step())[1])

    async def count_wakes(final_only: bool) -> int:
        wakes: list[Any] = []
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda *given: (wakes.append(given), call(*given))[1]
        )
        steps.clear()
        await asyncio.gather(*(consume(engine, one, final_only=final_only) for one in prepared))
        return len(wakes)

    assert 1 < asyncio.run(count_wakes(final_only=False)) <= len(steps)
    assert 1 <= asyncio.run(count_wakes(final_only=True)) <= 6


def test_a_failed_request_ends_its_final_only_stream(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = engine.llm.prepare(CONVERSATIONS[0], GREEDY)

    async def run() -> None:
        stream = engine.stream_prepared(prepared, final_only=True)
        monkeypatch.setattr(stream.requests[0].sampler, "sample", fail_with(KeyError("bug")))
        with pytest.raises(EngineError, match="in this request only"):
            await stream.completions()

    asyncio.run(run())
    assert engine.is_alive


def test_a_closed_event_loop_aborts_its_requests(engine: AsyncLLM) -> None:
    endless = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
    prepared = [engine.llm.prepare(one, endless) for one in CONVERSATIONS[:2]]

    async def submit() -> list[Any]:
        return [engine.stream_prepared(one) for one in prepared]

    streams = asyncio.run(submit())  # kept, so that nothing but the closed loop ends them
    asyncio.run(engine.chat(CONVERSATIONS[0], GREEDY))
    asyncio.run(engine.chat(CONVERSATIONS[0], GREEDY))
    assert len(streams) == 2 and engine.stats().num_running == 0


def test_a_closed_engine_refuses_prepared_requests(engine: AsyncLLM) -> None:
    prepared = engine.llm.prepare(CONVERSATIONS[0], GREEDY)
    engine.close()
    with pytest.raises(EngineError, match="the engine was closed"):
        asyncio.run(consume(engine, prepared))


def test_the_time_in_the_queue_is_reported() -> None:
    engine = AsyncLLM(new_llm(max_num_seqs=1))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prepared = [engine.llm.prepare(CONVERSATIONS[0], params) for _ in range(2)]

    async def run() -> list[Any]:
        return await asyncio.gather(*(consume(engine, one) for one in prepared))

    (_, (first,)), (_, (second,)) = asyncio.run(run())
    engine.close()
    assert 0 <= first.seconds.queue < second.seconds.queue
    assert second.seconds.queue > 0.9 * first.seconds.decode
