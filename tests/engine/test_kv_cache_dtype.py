"""kv_cache_dtype="int8": the engine's outputs in any cache state, its capacity, and its errors.

The reference is the request alone in a new engine with the same kv_cache_dtype, in float32. Where
sums differ in their last bit, a number may be rounded to the next integer: a 127th of its head.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl import memory
from qwen2vl.engine import LLM, AsyncLLM, SamplingParams
from qwen2vl.engine.arguments.keyword_hints import describe_unknown_keyword
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.kv_cache import capacity
from qwen2vl.engine.outputs import Completion
from qwen2vl.errors import InputError
from qwen2vl.loading import load
from qwen2vl.model import Int8KVCache
from tests.engine.test_llm import random_image, user
from tests.folders import write_tiny
from tests.parity.reference import random_model
from tests.tiny import tiny_config, tiny_processor

MODEL = random_model(tiny_config(tie_word_embeddings=False))
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
TOLERANCE = 0.02  # of log probabilities: a few numbers of the cache rounded the other way

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [user("Hi")],
    [user("What is this?", random_image())],
    [user("And these?", random_image(84, 56), random_image(140, 140, seed=2))],
    [user("A longer question about a larger picture, please.", random_image(224, 196, seed=3))],
    [user("What is this?", random_image())],  # again
]


def new_llm(kv_cache_dtype: Any = "int8", **engine: Any) -> LLM:
    config = EngineConfig(**engine)
    return LLM(MODEL, tiny_processor(), engine=config, kv_cache_dtype=kv_cache_dtype)


@lru_cache
def reference_completion(index: int, params: SamplingParams = GREEDY) -> Completion:
    return new_llm().chat(CONVERSATIONS[index], params)[0]


def logprobs(completion: Completion) -> list[float]:
    return [entry.logprob for entry in completion.logprobs or ()]


def assert_similar(got: Completion, want: Completion, tolerance: float = TOLERANCE) -> None:
    assert got.token_ids == want.token_ids
    np.testing.assert_allclose(logprobs(got), logprobs(want), rtol=0, atol=tolerance)


def test_caches_are_int8() -> None:
    llm = new_llm()
    llm.chat(CONVERSATIONS[1], GREEDY)
    caches = llm.engine_core.runner.caches.values()
    assert caches
    assert all(isinstance(cache, Int8KVCache) for cache in caches)
    assert llm.kv_cache_dtype == "int8"


def test_batched_equals_alone() -> None:
    for index, completion in enumerate(new_llm().chat(CONVERSATIONS, GREEDY)):
        assert_similar(completion, reference_completion(index))


@settings(max_examples=8, deadline=None)
@given(
    max_num_batched_tokens=st.integers(32, 90),
    max_num_seqs=st.integers(1, 4),
    kv_cache_tokens=st.integers(320, 640),
    num_speculative_tokens=st.sampled_from([0, 4]),
    order=st.permutations(range(len(CONVERSATIONS))),
)
def test_chunks_preemption_and_draft_tokens_do_not_change_the_output(
    max_num_batched_tokens: int,
    max_num_seqs: int,
    kv_cache_tokens: int,
    num_speculative_tokens: int,
    order: list[int],
) -> None:
    llm = new_llm(
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        kv_cache_tokens=kv_cache_tokens,
        num_speculative_tokens=num_speculative_tokens,
    )
    completions = llm.chat([CONVERSATIONS[i] for i in order], GREEDY)
    for index, completion in zip(order, completions, strict=True):
        assert_similar(completion, reference_completion(index))
    assert llm.engine_core.scheduler.pool.num_used_blocks == 0


def test_a_second_turn_reuses_the_prefix_in_place() -> None:
    llm = new_llm()
    question = user("What is this, and what stands beside it?", random_image())
    llm.chat([question], GREEDY)
    conversation = [question, {"role": "assistant", "content": "A square."}, user("Why?")]
    (second,) = llm.chat(conversation, GREEDY)
    assert second.cached_tokens > 64
    assert_similar(second, new_llm().chat(conversation, GREEDY)[0])


def test_samples_copy_their_prefix_with_its_scales() -> None:
    params = replace(GREEDY, temperature=3.0, top_k=0, n=3, seed=5)
    conversation = [user("Tell me a rather long story about this picture.", random_image(112, 112))]
    completions = new_llm().chat(conversation, params)
    assert len({one.token_ids for one in completions}) == 3
    assert [c.cached_tokens > 32 for c in completions] == [False, True, True]
    for sample, one in enumerate(completions):
        alone = replace(params, n=1, seed=5 + sample)
        assert_similar(one, new_llm().chat(conversation, alone)[0])


@pytest.mark.parametrize("kernels", ["", "off"])
def test_outputs_are_near_those_of_the_models_dtype(
    monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    """Of the prompt alone: later tokens may differ, and their probabilities with them."""
    monkeypatch.setenv("QWEN2VL_KERNELS", kernels)
    for index in range(len(CONVERSATIONS)):
        want = new_llm("auto").chat(CONVERSATIONS[index], GREEDY)[0]
        got = new_llm().chat(CONVERSATIONS[index], GREEDY)[0]
        assert abs(logprobs(got)[0] - logprobs(want)[0]) < 0.1
        assert logprobs(got) != logprobs(want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nano_answers_as_with_a_plain_cache(dtype: Any) -> None:
    questions = [
        "What color is a ripe tomato?",
        "Hello, who are you? Say something about shapes.",
        "List three colors and three shapes, then count to ten.",
    ]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)
    plain, int8 = (
        LLM("nano", device="cpu", dtype=dtype, kv_cache_dtype=name) for name in ("auto", "int8")
    )
    for want, got in zip(plain.chat(questions, params), int8.chat(questions, params), strict=True):
        same = sum(a == b for a, b in zip(got.token_ids, want.token_ids, strict=True))
        assert same >= 36
        assert abs(logprobs(got)[0] - logprobs(want)[0]) < 0.1


def test_the_same_memory_holds_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model takes 512 bytes a token in float32, 160 in int8."""
    monkeypatch.setattr(capacity, "available_memory", lambda _: 4 * 512 * 40_000)
    assert new_llm("auto").kv_cache_tokens == 40_000
    assert new_llm("int8").kv_cache_tokens == 128_000


@pytest.mark.parametrize("value", ["fp8", "float8_e4m3fn", "", None, 8, torch.int8])
def test_wrong_values_are_refused_with_the_allowed_ones(tmp_path: Path, value: Any) -> None:
    write_tiny(tmp_path / "tiny")
    for create in (
        lambda: new_llm(value),
        lambda: LLM(tmp_path / "tiny", kv_cache_dtype=value),
        lambda: load(tmp_path / "tiny", kv_cache_dtype=value),
    ):
        with pytest.raises(InputError, match=r"^kv_cache_dtype: got .*, must be auto or int8$"):
            create()


def test_other_devices_than_the_cpu_are_refused() -> None:
    device = torch.device("cuda:1")
    with pytest.raises(
        InputError, match=r"^kv_cache_dtype: got int8 on cuda:1, but the int8 KV cache is for the C"
    ):
        memory.kv_cache_class("int8", device)
    memory.kv_cache_class("auto", device)


def test_an_llm_in_memory_keeps_its_own() -> None:
    llm = new_llm()
    with pytest.raises(InputError, match="kv_cache_dtype: got 'int8', but the LLM is in memory"):
        AsyncLLM(llm, kv_cache_dtype="int8")
    AsyncLLM(llm, kv_cache_dtype="auto").close()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cache_dtype", "write LLM(kv_cache_dtype='int8')"),  # vLLM's CacheConfig
        ("cache_implementation", "write LLM(kv_cache_dtype='int8')"),  # transformers
        ("calculate_kv_scales", "each token has scales of its own; leave it out"),
    ],
)
def test_names_of_other_libraries_are_answered(name: str, hint: str) -> None:
    assert describe_unknown_keyword(name, []).startswith(hint)
