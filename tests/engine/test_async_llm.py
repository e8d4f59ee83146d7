"""Many coroutines, one engine: the same answers, tidy when somebody leaves or something breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.async_llm import AsyncLLM
from qwen2vl.errors import EngineError, InputError
from tests.engine.test_llm import picture, user
from tests.engine.test_runner import CONVERSATIONS, GREEDY, MODEL, alone, assert_same
from tests.tiny import tiny_processor


@pytest.fixture
def engine() -> Iterator[AsyncLLM]:
    made = AsyncLLM(LLM.of(MODEL, tiny_processor()))
    yield made
    made.close()


def test_callers_at_once_get_the_answers_of_one_alone(engine: AsyncLLM) -> None:
    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(engine.chat(one, GREEDY) for one in CONVERSATIONS))

    for index, (completion,) in enumerate(asyncio.run(all_at_once())):
        assert_same(completion, alone(index))


def test_deltas_come_as_they_are_written(engine: AsyncLLM) -> None:
    async def listen() -> tuple[str, list[Any], Any]:
        answer = await engine.ask([user("Hi")], GREEDY)
        deltas = [delta async for delta in answer]
        (completion,) = await answer.completions()
        return "".join(d.text for d in deltas), deltas, completion

    text, deltas, completion = asyncio.run(listen())
    assert text == completion.text
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"]
    assert completion.seconds.process > 0


def test_leaving_early_cancels(engine: AsyncLLM) -> None:
    async def leave() -> None:
        endless = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
        async for _ in await engine.ask([user("Hi")], endless):
            break
        await engine.chat([user("Hello")], GREEDY)  # the engine has turned since

    asyncio.run(leave())
    assert not engine.llm.scheduler.has_work
    assert engine.llm.scheduler.pool.num_busy == 0


def test_a_cancelled_task_cancels_its_request(engine: AsyncLLM) -> None:
    async def give_up() -> None:
        endless = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.chat([user("Hi")], endless), 0.05)
        await engine.chat([user("Hello")], GREEDY)

    asyncio.run(give_up())
    assert not engine.llm.scheduler.has_work


ENDLESS = SamplingParams(temperature=0, max_tokens=20_000, ignore_eos=True)


def test_completions_after_leaving_early_say_that_it_was_cancelled(engine: AsyncLLM) -> None:
    async def leave() -> None:
        answer = await engine.ask([user("Hi")], ENDLESS)
        async for _ in answer:
            break
        for _ in range(2):
            with pytest.raises(EngineError, match="was cancelled"):
                await asyncio.wait_for(answer.completions(), 20)

    asyncio.run(leave())


def test_who_still_listens_hears_that_another_cancelled(engine: AsyncLLM) -> None:
    async def listen_and_cancel() -> None:
        answer = await engine.ask([user("Hi")], ENDLESS)
        listener = asyncio.create_task(answer.completions())
        await asyncio.sleep(0.02)
        answer.cancel()
        with pytest.raises(EngineError, match="was cancelled"):
            await asyncio.wait_for(listener, 20)

    asyncio.run(listen_and_cancel())


def test_cancelling_what_is_over_does_nothing(engine: AsyncLLM) -> None:
    async def finish() -> Any:
        answer = await engine.ask([user("Hi")], GREEDY)
        before = await answer.completions()
        answer.cancel()
        return before, await answer.completions()

    before, after = asyncio.run(finish())
    assert before[0].token_ids == after[0].token_ids == alone(0).token_ids


def test_bad_input_is_told_to_its_caller_alone(engine: AsyncLLM) -> None:
    async def both() -> list[Any]:
        bad = engine.chat([user("Hi")], SamplingParams(stop_token_ids=[10**6]))
        return await asyncio.gather(engine.chat([user("Hi")], GREEDY), bad, return_exceptions=True)

    good, bad = asyncio.run(both())
    assert_same(good[0], alone(0))
    assert isinstance(bad, InputError)


def test_several_samples_share_one_stream(engine: AsyncLLM) -> None:
    async def listen() -> Any:
        params = SamplingParams(temperature=2.0, n=3, seed=1, max_tokens=6, ignore_eos=True)
        answer = await engine.ask([user("Hi", picture())], params)
        deltas = [delta async for delta in answer]
        return deltas, await answer.completions()

    deltas, completions = asyncio.run(listen())
    assert len(completions) == 3
    for index, completion in enumerate(completions):
        assert "".join(d.text for d in deltas if d.index == index) == completion.text


def test_a_dead_engine_says_why_and_stays_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncLLM(LLM.of(MODEL, tiny_processor()))
    monkeypatch.setattr(
        engine.llm.runner, "_forward", lambda *_: (_ for _ in ()).throw(RuntimeError("shape"))
    )

    async def ask() -> None:
        await engine.chat([user("Hi")], GREEDY)

    for _ in range(2):
        with pytest.raises(EngineError, match="engine died: RuntimeError: shape"):
            asyncio.run(ask())
    assert not engine.is_alive


def test_closing_ends_what_is_under_way() -> None:
    engine = AsyncLLM(LLM.of(MODEL, tiny_processor()))

    async def close() -> None:
        answer = await engine.ask([user("Hi")], SamplingParams(max_tokens=2000, ignore_eos=True))
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="closed"):
            await answer.completions()

    asyncio.run(close())
    assert not engine.llm.scheduler.has_work
    assert engine.llm.scheduler.pool.num_busy == 0
    assert_same(engine.llm.chat(CONVERSATIONS[0], GREEDY)[0], alone(0))


def test_an_engine_that_ends_while_a_request_is_made_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = AsyncLLM(LLM.of(MODEL, tiny_processor()))
    make = engine.llm.sequences

    def closing(*args: Any) -> Any:
        engine.close()
        return make(*args)

    monkeypatch.setattr(engine.llm, "sequences", closing)
    for _ in range(2):
        with pytest.raises(EngineError, match="closed"):
            asyncio.run(asyncio.wait_for(engine.chat([user("Hi")], GREEDY), 20))
    assert engine._inbox.qsize() <= 1
