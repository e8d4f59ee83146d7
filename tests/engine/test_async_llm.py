"""AsyncLLM: concurrent callers get the same outputs; aborts, failures and shutdown are clean."""

from __future__ import annotations

import asyncio
import gc
import threading
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


def test_a_stream_is_iterated_without_await_or_made_a_task(engine: AsyncLLM) -> None:
    async def consume() -> tuple[str, Any]:
        text = "".join([delta.text async for delta in engine.stream([user("Hi")], GREEDY)])
        stream = await asyncio.create_task(engine.stream([user("Hi")], GREEDY))
        return text, await stream.completions()

    text, (completion,) = asyncio.run(consume())
    assert text == completion.text


def test_leaving_a_stream_that_was_not_awaited_aborts_it(engine: AsyncLLM) -> None:
    async def leave() -> None:
        async for _ in engine.stream("Hi", ENDLESS):
            break
        await engine.chat("Hello", GREEDY)
        with pytest.raises(InputError, match="messages: there is no such argument"):
            async for _ in engine.stream(messages=[]):
                pass

    asyncio.run(leave())
    assert not engine.llm.engine_core.scheduler.has_unfinished_requests


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


def fail_with(error: BaseException) -> Any:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_a_dead_engine_reports_the_first_cause_and_can_be_restarted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = AsyncLLM(LLM(MODEL, tiny_processor()))
    cause = RuntimeError("shape")
    monkeypatch.setattr(engine.llm.engine_core.runner, "_forward", fail_with(cause))

    async def chat_concurrently() -> list[Any]:
        chats = [engine.chat([user(text)], GREEDY) for text in ("a", "b")]
        return await asyncio.gather(*chats, return_exceptions=True)

    errors = [*asyncio.run(chat_concurrently()), *asyncio.run(chat_concurrently())]
    for error in errors:
        assert isinstance(error, EngineError) and error.__cause__ is cause
        assert "engine died, and all its requests with it: RuntimeError: shape" in str(error)
    assert len(set(map(id, errors))) == len(errors)  # each caller has its own
    assert not engine.is_alive and repr(engine).endswith("died: RuntimeError)")
    (completion,) = engine.llm.chat(CONVERSATIONS[0], GREEDY)  # nobody owns the LLM now
    assert_same_completion(completion, reference_completion(0))
    engine.restart()
    engine.restart()  # does nothing while it runs
    assert engine.is_alive and repr(engine).endswith("running)")
    assert_same_completion(
        asyncio.run(engine.chat(CONVERSATIONS[0], GREEDY))[0], reference_completion(0)
    )
    engine.close()


def test_another_async_llm_can_follow_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(MODEL, tiny_processor())
    dead = AsyncLLM(llm)
    monkeypatch.setattr(llm.engine_core.runner, "_forward", fail_with(KeyError("x")))
    with pytest.raises(EngineError, match="engine died"):
        asyncio.run(dead.chat("Hi", GREEDY))
    engine = AsyncLLM(llm)
    with pytest.raises(EngineError, match="AsyncLLM: this LLM is owned by an AsyncLLM"):
        dead.restart()
    dead.close()
    (completion,) = asyncio.run(engine.chat(CONVERSATIONS[0], GREEDY))
    assert_same_completion(completion, reference_completion(0))
    engine.close()


def test_a_bug_in_one_request_does_not_reach_the_others(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = engine.llm.create_requests

    def create_requests(prompt: Any, params: Any, *, index: int = 0) -> Any:
        requests = create(prompt, params, index=index)
        if prompt.items:
            monkeypatch.setattr(requests[0].sampler, "sample", fail_with(KeyError("bug")))
        return requests

    monkeypatch.setattr(engine.llm, "create_requests", create_requests)

    async def chat_concurrently() -> list[Any]:
        chats = [engine.chat(CONVERSATIONS[index], GREEDY) for index in (0, 1, 0)]
        return await asyncio.gather(*chats, return_exceptions=True)

    first, bad, last = asyncio.run(chat_concurrently())
    for completions in (first, last):
        assert_same_completion(completions[0], reference_completion(0))
    assert isinstance(bad, EngineError) and "in this request only" in str(bad)
    assert engine.is_alive


def test_requests_that_were_queued_before_do_not_end_the_engine() -> None:
    llm = LLM(MODEL, tiny_processor())
    (request,) = llm.create_requests(llm.processor(CONVERSATIONS[1]), GREEDY)
    llm.add_request(request)
    engine = AsyncLLM(llm)
    (completion,) = asyncio.run(engine.chat(CONVERSATIONS[0], GREEDY))
    assert_same_completion(completion, reference_completion(0))
    engine.close()


def test_an_async_llm_loads_and_closes_its_own_llm() -> None:
    async def ask() -> tuple[AsyncLLM, Any]:
        async with AsyncLLM("nano", max_model_len=512) as engine:
            return engine, await engine.chat("What is apple backwards?", temperature=0)

    engine, (completion,) = asyncio.run(ask())
    assert engine.llm.max_model_len == 512 and completion.text
    assert repr(engine) == "AsyncLLM(LLM('nano', closed), closed)"
    engine.close()
    with pytest.raises(EngineError, match="this LLM was closed"):
        engine.restart()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"quantize": "int8"}, "quantize: got 'int8', but the LLM is in memory already; give it"),
        ({"quantise": "int8"}, "quantise: there is no such argument; did you mean quantize?"),
    ],
)
def test_options_of_loading_need_a_model_to_load(given: dict[str, Any], text: str) -> None:
    llm = LLM(MODEL, tiny_processor())
    with pytest.raises(InputError) as caught:
        AsyncLLM(llm, **given)
    assert text in str(caught.value)
    llm.chat("Hi", GREEDY)  # is not owned


def test_forms_of_arguments(engine: AsyncLLM) -> None:
    keywords = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 2}

    async def ask() -> Any:
        one = await engine.chat("Hi", **keywords)
        batch = await engine.chat(["Hi", CONVERSATIONS[1]], GREEDY)
        stream = await engine.stream("What is this?", images=random_image(), **keywords)
        return one, batch, await stream.completions()

    (one,), (two, three), (four,) = asyncio.run(ask())
    for completion, index in ((one, 0), (two, 0), (three, 1), (four, 1)):
        assert_same_completion(completion, reference_completion(index))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda e: e.chat(["Hi", [{"role": "x"}]]), r"conversations\[1\]: messages\[0\].role"),
        (lambda e: e.chat("Hi", {"temperature": 0}), r"pass SamplingParams\(temperature=0\)"),
        (lambda e: e.stream(["Hi"]), r"conversation\[0\]: got 'Hi' in a list of messages"),
        (lambda e: e.stream("Hi", temprature=0), "temprature: .*did you mean temperature"),
    ],
)
def test_wrong_arguments_end_nothing(engine: AsyncLLM, call: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        asyncio.run(call(engine))
    assert engine.is_alive


def test_every_iterator_of_a_finished_stream_ends(engine: AsyncLLM) -> None:
    async def consume() -> list[Any]:
        stream = await engine.stream("Hi", GREEDY)
        consumers = [asyncio.create_task(stream.completions()) for _ in range(3)]
        return await asyncio.wait_for(asyncio.gather(*consumers), 20)

    for (completion,) in asyncio.run(consume()):
        assert completion.token_ids == reference_completion(0).token_ids


def test_closing_twice_does_nothing() -> None:
    engine = AsyncLLM(LLM(MODEL, tiny_processor()))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match=r"the engine was closed; AsyncLLM\.restart\(\) starts"):
        asyncio.run(engine.chat("Hi"))
    engine.restart()
    assert asyncio.run(engine.chat("Hi", GREEDY))[0].token_ids
    engine.close()


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


def test_an_async_llm_without_references_releases_the_llm_and_ends_its_thread() -> None:
    llm, threads_before = LLM(MODEL, tiny_processor()), set(threading.enumerate())

    async def ask_and_forget() -> Any:
        stream = await AsyncLLM(llm).stream(CONVERSATIONS[0], GREEDY)
        return await stream.completions()  # the stream keeps the engine until here

    (completion,) = asyncio.run(ask_and_forget())
    assert_same_completion(completion, reference_completion(0))
    gc.collect()
    for thread in set(threading.enumerate()) - threads_before:
        if thread.name == "engine":
            thread.join(20)
            assert not thread.is_alive()
    assert_same_completion(llm.chat(CONVERSATIONS[0], GREEDY)[0], reference_completion(0))


def test_a_caller_whose_request_cannot_be_added_is_told(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.llm.engine_core, "add_request", fail_with(KeyError("bug")))

    async def chat() -> None:
        await asyncio.wait_for(engine.chat("Hi", GREEDY), 20)

    with pytest.raises(EngineError, match="engine died, and all its requests with it: KeyError"):
        asyncio.run(chat())


def test_the_error_of_a_dead_engine_is_not_blamed_on_a_conversation(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = RuntimeError("shape")
    monkeypatch.setattr(engine.llm.engine_core.runner, "_forward", fail_with(cause))
    for _ in range(2):
        with pytest.raises(EngineError, match=r"^the engine died") as caught:
            asyncio.run(engine.chat(["Hi", "Ho"], GREEDY))
        assert caught.value.__cause__ is cause
