"""Any call with a wrong argument raises an error of the library that names it, and changes nothing.

Each example draws a public function, one of its arguments and a value of another type or out of
range. The call may succeed where the value happens to be valid. After it, a good call gives the
same answer as before.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qwen2vl import (
    LLM,
    AsyncLLM,
    EngineConfig,
    Grammar,
    Processor,
    Qwen2VL,
    Qwen2VLConfig,
    SamplingParams,
    load,
)
from qwen2vl.errors import Qwen2VLError
from tests.folders import write_tiny
from tests.parity.reference import random_model
from tests.tiny import tiny_config, tiny_processor

GREEDY = SamplingParams(temperature=0, max_tokens=2)
TEXT = "Hi"


class Opaque:
    """An object that is nothing in particular."""

    def __repr__(self) -> str:
        return "Opaque()"


NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, -(2**63), 2**64, 10**30, 0.5, -1.5, 1e300, math.nan, math.inf]),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.sampled_from(["", "x", "\0", "auto", "../..", "<|image_pad|>", "\ud800", "a" * 300]),
    st.sampled_from([b"", b"\x89PNG", Opaque(), Opaque, np.float32(1), np.zeros((2, 2))]),
    st.sampled_from([torch.zeros(2), range(3), {1, 2}, Path("nowhere"), complex(1, 2)]),
)
KEYS = st.sampled_from(["role", "content", "type", "image", "text", "temperature", "", 0, None])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=4,
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), VALUES),
        "content": st.one_of(st.just(TEXT), VALUES),
        "tool_calls": VALUES,
        "tool_call_id": VALUES,
        "other": VALUES,
    },
)
CONVERSATIONS = st.one_of(VALUES, MESSAGES, st.lists(st.one_of(MESSAGES, VALUES), max_size=3))


@cache
def llm() -> LLM:
    return LLM(random_model(tiny_config()), tiny_processor(), max_model_len=256)


@cache
def folder() -> Path:
    path = Path(mkdtemp(prefix="tiny-")) / "tiny"
    write_tiny(path)
    return path


@cache
def good_answer() -> tuple[int, ...]:
    return llm().chat(TEXT, GREEDY)[0].token_ids


@dataclass(frozen=True)
class Call:
    """A public function, and the arguments that are varied, each with what its errors name."""

    function: Callable[..., Any]
    arguments: dict[str, tuple[str, ...]]  # argument -> accepted names of it in messages


def names(text: str, **others: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in text.split()} | others


# Errors name the item, as in "image 1: cannot read a float", or the file.
MEDIA = {"images": ("image", "file"), "videos": ("video", "file")}
CONVERSATION = {"conversation": ("conversation", "messages")}
CHAT = {"conversations": ("conversations", "messages"), **MEDIA, **names("params tools on_delta")}
SAMPLING = names(" ".join(f.name for f in fields(SamplingParams)))
LOAD = names(
    "device dtype quantize adapter max_model_len kv_cache_dtype hf_overrides min_pixels max_pixels"
    " video_preset limits"
)
LOAD |= {"video_preset": ("video_preset", "video preset")}
IN_MEMORY = LOAD | names("processor compile adapters engine generation_defaults")


def with_text(call: Callable[..., Any], name: str, **given: Any) -> Any:
    return call(**{name: TEXT, **given})


def with_sampling(call: Callable[..., Any], name: str, **given: Any) -> Any:
    return call(**{name: TEXT, "temperature": 0, "max_tokens": 2, **given})


def stream_all(**given: Any) -> Any:
    return llm().stream(**{"conversation": TEXT, **given}).completions()


def generate_prepared(**given: Any) -> Any:
    return llm().generate_prepared(**{"prepared": llm().prepare(TEXT, GREEDY), **given})


def new_llm(**given: Any) -> LLM:
    return LLM(**{"model": llm().model, "processor": tiny_processor(), **given})


def new_async_llm(**given: Any) -> None:
    AsyncLLM(**{"llm": llm().model, "processor": tiny_processor(), **given}).close()


def async_chat(**given: Any) -> Any:
    async def chat() -> Any:
        async with AsyncLLM(llm()) as engine:
            return await engine.chat(**{"conversations": TEXT, "max_tokens": 2, **given})

    return asyncio.run(chat())


def async_stream(**given: Any) -> Any:
    async def stream() -> Any:
        async with AsyncLLM(llm()) as engine:
            return await (await engine.stream(**{"conversation": TEXT, **given})).completions()

    return asyncio.run(stream())


def process(**given: Any) -> Any:
    return tiny_processor()(**{"messages": [{"role": "user", "content": TEXT}], **given})


def from_text(**given: Any) -> Any:
    return tiny_processor().from_text(**{"text": TEXT, **given})


def new_processor(**given: Any) -> Processor:
    old = tiny_processor()
    good = {"config": old.config, "tokenizer": old.tokenizer, "pixels": old.pixels}
    return Processor(**{**good, **given})


def new_config(**given: Any) -> Qwen2VLConfig:
    return replace(tiny_config(), **given)


def without(arguments: dict[str, tuple[str, ...]], *left_out: str) -> dict[str, tuple[str, ...]]:
    return {name: accepted for name, accepted in arguments.items() if name not in left_out}


@cache
def calls() -> list[Call]:
    chat = partial(with_text, llm().chat, "conversations")
    sampled = partial(with_sampling, llm().chat, "conversations")
    grammar = {"json_schema": ("schema",), "regex": ("regex", "pattern"), "choice": ("choice",)}
    return [
        Call(chat, CHAT),
        Call(sampled, SAMPLING),
        Call(partial(with_sampling, llm().generate, "prompts"), SAMPLING),
        Call(
            partial(with_text, llm().generate, "prompts"),
            {"prompts": ("prompt", "text"), **names("params on_delta")},
        ),
        Call(
            partial(with_text, llm().embed, "conversations"),
            without(CHAT, "params", "tools", "on_delta") | names("pooling adapter"),
        ),
        Call(
            partial(with_text, llm().prepare, "conversation"),
            {**CONVERSATION, **MEDIA, **names("params tools")},
        ),
        Call(stream_all, {**CONVERSATION, **MEDIA, **SAMPLING}),
        Call(generate_prepared, names("prepared on_delta on_step")),
        Call(SamplingParams, SAMPLING),
        Call(EngineConfig, names(" ".join(f.name for f in fields(EngineConfig)))),
        Call(Grammar.json_schema, {"schema": ("JSON schema", "schema")}),
        Call(Grammar.regex, {"pattern": grammar["regex"]}),
        Call(Grammar.choice, {"texts": grammar["choice"]}),
        Call(Grammar.lark, {"text": ("grammar", "lark")}),
        Call(process, {"messages": ("messages",), **names("tools")}),
        Call(from_text, {"text": ("text",), "media": ("media", "text")}),
        Call(
            new_processor, names("config tokenizer pixels limits") | {"video_preset": ("preset",)}
        ),
        Call(Qwen2VL, names("config")),
        Call(Qwen2VLConfig.from_dict, {"raw": ("config.json",)}),
        Call(new_config, names("vision text image_token_id eos_token_id")),
        Call(new_llm, {"model": ("model", "processor"), **IN_MEMORY}),
        Call(partial(LLM, folder()), IN_MEMORY),
        Call(partial(load, folder()), LOAD),
        Call(load, {"model": ("model",)}),
        Call(new_async_llm, {"llm": ("model", "processor"), **IN_MEMORY}),
        Call(async_chat, without(CHAT, "on_delta", "params")),
        Call(async_stream, {**CONVERSATION, **MEDIA, **SAMPLING}),
    ]


@st.composite
def wrong_calls(draw: st.DrawFn) -> tuple[Call, str, Any]:
    call = draw(st.sampled_from(calls()))
    name = draw(st.sampled_from(sorted(call.arguments)))
    is_messages = name in ("conversations", "conversation", "messages")
    value = draw(CONVERSATIONS if is_messages else VALUES)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Valid, and slow or without a check of its own: long outputs, compilation, any function.
    assume(not (name == "max_tokens" and is_number and value > 3))
    assume(not (name == "compile" and value is True))
    assume(not (name in ("on_delta", "on_step") and callable(value)))
    return call, name, value


def check(drawn: tuple[Call, str, Any]) -> None:
    call, name, value = drawn
    expected = good_answer()
    try:
        call.function(**{name: value})
    except Qwen2VLError as error:
        text = str(error)
        assert any(accepted in text for accepted in call.arguments[name]), f"{name}: {text}"
        assert len(text) < 700, "the value is shown in full"
    assert llm().chat(TEXT, GREEDY)[0].token_ids == expected


LENIENT = {"suppress_health_check": [HealthCheck.filter_too_much, HealthCheck.too_slow]}


@given(wrong_calls())
@settings(max_examples=200, **LENIENT)
def test_wrong_arguments_raise_our_errors_and_change_nothing(drawn: tuple[Call, str, Any]) -> None:
    check(drawn)


@pytest.mark.slow
@given(wrong_calls())
@settings(max_examples=2000, **LENIENT)
def test_more_wrong_arguments_raise_our_errors(drawn: tuple[Call, str, Any]) -> None:
    check(drawn)


def test_the_public_constructors_of_data_are_covered() -> None:
    covered = {getattr(call.function, "func", call.function) for call in calls()}
    assert {SamplingParams, EngineConfig, LLM, load} <= covered
    assert isinstance(tiny_processor(), Processor)
