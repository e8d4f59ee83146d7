"""Preparation of requests: media options, cache salts, and where the work is done."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from qwen2vl.engine import Grammar, SamplingParams
from qwen2vl.errors import EngineDeadError, InputError
from qwen2vl.processor.messages import parse_messages
from qwen2vl.server.errors import APIError
from qwen2vl.server.serving.generation import (
    PromptSource,
    generate,
    prepare,
    with_cache_salt,
)
from qwen2vl.server.state import Caller, ServerState
from tests.server.serving.pictures import picture, question
from tests.server.serving.scripted import scripted

GREEDY = SamplingParams(temperature=0, max_tokens=4)


def test_salts() -> None:
    plain, keyed = Caller("r", b""), Caller("r", b"k" * 16)
    assert with_cache_salt(plain, None) is plain
    salts = {
        with_cache_salt(caller, salt).cache_salt
        for caller in (plain, keyed)
        for salt in ("a", "b", None)
    }
    assert len(salts) == 6
    assert with_cache_salt(plain, "a") == with_cache_salt(plain, "a")


def test_the_prompt_has_the_salt_of_the_caller(server_state: ServerState) -> None:
    caller = Caller("r", b"salt")
    messages = parse_messages(question("?", picture()))
    prepared = asyncio.run(prepare(server_state, caller, messages, GREEDY))
    assert prepared.prompt.cache_salt == b"salt" and prepared.process_seconds > 0


@pytest.mark.parametrize(
    ("messages", "params", "thread"),
    [
        (question("?"), GREEDY, "MainThread"),
        (question("? " * 4000), GREEDY, "asyncio"),
        (question("?"), SamplingParams(grammar=Grammar.regex("a")), "asyncio"),
        (question("?", picture()), GREEDY, "prepare-media"),
    ],
)
def test_only_short_texts_are_prepared_in_the_loop(
    server_state: ServerState,
    monkeypatch: pytest.MonkeyPatch,
    messages: Any,
    params: SamplingParams,
    thread: str,
) -> None:
    llm = server_state.engine.llm
    names: list[str] = []
    monkeypatch.setattr(llm, "validate", lambda *_: names.append(threading.current_thread().name))
    asyncio.run(prepare(server_state, Caller(), parse_messages(messages), params))
    assert len(names) == 1 and names[0].startswith(thread)


def test_errors_without_a_place_get_one(server_state: ServerState) -> None:
    def fail() -> Any:
        raise InputError("something")

    source = PromptSource(build=fail, param="prompt[3]")
    with pytest.raises(InputError) as info:
        asyncio.run(source.run(source.build))
    assert info.value.param == "prompt[3]"


def test_a_closed_engine_refuses(server_state: ServerState, monkeypatch: Any) -> None:
    state = scripted(server_state, "x")

    def closed(*_: Any, **__: Any) -> None:
        raise EngineDeadError("the engine was closed; secret")

    monkeypatch.setattr(state.engine, "stream_prepared", closed)

    async def run() -> None:
        prepared = await prepare(state, Caller(), parse_messages(question("?")), GREEDY)
        async with generate(state, Caller(), prepared, began=0.0):
            pass

    with pytest.raises(APIError) as info:
        asyncio.run(run())
    assert info.value.status == 503 and "secret" not in info.value.message


def test_a_request_is_aborted_when_its_user_leaves(server_state: ServerState) -> None:
    async def run() -> None:
        params = SamplingParams(max_tokens=2000, ignore_eos=True)
        prepared = await prepare(server_state, Caller(), parse_messages(question("?")), params)
        async with generate(server_state, Caller(), prepared, began=0.0) as generation:
            async for _ in generation.deltas():
                break
        deadline = asyncio.get_running_loop().time() + 10
        while server_state.engine.stats().num_running:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.005)

    asyncio.run(run())
