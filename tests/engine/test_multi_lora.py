"""Multi-LoRA: each request of a batch equals a model into which its adapter was merged."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.engine import LLM, AsyncLLM, SamplingParams
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.outputs import Completion
from qwen2vl.errors import CheckpointError, InputError
from tests.adapters import TEXT, VISION, write_adapter
from tests.engine.test_llm import random_image, user
from tests.engine.test_runner import CONVERSATIONS, GREEDY, MODEL, assert_same_completion
from tests.folders import write_tiny
from tests.tiny import tiny_processor

NAMES = (None, "all", "text", "vision")
TARGETS = {"all": (*TEXT, *VISION, "lm_head"), "text": TEXT, "vision": VISION}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    write_tiny(path / "model", model=MODEL)
    for seed, (name, targets) in enumerate(TARGETS.items(), 1):
        write_adapter(path / name, MODEL, targets, seed=seed)
    write_adapter(path / "other", MODEL, TARGETS["vision"], seed=9)
    return path


def new_llm(root: Path, **engine: Any) -> LLM:
    folders = {name: root / name for name in TARGETS}
    config = EngineConfig(**engine)
    return LLM(MODEL, tiny_processor(), engine=config, adapters=folders)


def greedy_with(name: str | None, **changes: Any) -> SamplingParams:
    return replace(GREEDY, adapter=name, **changes)


@lru_cache
def merged_llm(root: Path, name: str | None) -> LLM:
    adapter = None if name is None else root / name
    return LLM(root / "model", dtype="float32", adapter=adapter)


@lru_cache
def reference_completion(root: Path, index: int, name: str | None) -> Completion:
    """Reference: a model into which the adapter was merged."""
    llm = merged_llm(root, name)
    llm.reset_caches()
    return llm.chat(CONVERSATIONS[index], replace(GREEDY, adapter=None))[0]


def test_the_adapters_change_the_output(root: Path) -> None:
    for index in (0, 1):
        outputs = {reference_completion(root, index, name).token_ids for name in NAMES}
        assert len(outputs) >= 3 if index == 0 else len(outputs) == 4


def test_each_request_equals_its_merged_model(root: Path) -> None:
    pairs = [(index, NAMES[index % 4]) for index in range(len(CONVERSATIONS))]
    pairs += [(1, name) for name in NAMES]
    llm = new_llm(root)
    got = llm.chat([CONVERSATIONS[i] for i, _ in pairs], [greedy_with(name) for _, name in pairs])
    for completion, (index, name) in zip(got, pairs, strict=True):
        assert_same_completion(completion, reference_completion(root, index, name))


@settings(max_examples=5, deadline=None)
@given(
    max_num_batched_tokens=st.integers(32, 90),
    max_num_encoder_patches=st.integers(4, 90),
    max_num_seqs=st.integers(1, 4),
    kv_cache_tokens=st.integers(320, 640),
    names=st.lists(st.sampled_from(NAMES), min_size=8, max_size=8),
    num_speculative_tokens=st.sampled_from([0, 4]),
)
def test_step_limits_do_not_change_the_output_with_adapters(
    root: Path,
    max_num_batched_tokens: int,
    max_num_encoder_patches: int,
    max_num_seqs: int,
    kv_cache_tokens: int,
    names: list[str | None],
    num_speculative_tokens: int,
) -> None:
    llm = new_llm(
        root,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_encoder_patches=max_num_encoder_patches,
        max_num_seqs=max_num_seqs,
        kv_cache_tokens=kv_cache_tokens,
        num_speculative_tokens=num_speculative_tokens,
    )
    got = llm.chat(CONVERSATIONS, [greedy_with(name) for name in names])
    for index, (completion, name) in enumerate(zip(got, names, strict=True)):
        assert_same_completion(completion, reference_completion(root, index, name))
    assert llm.engine_core.scheduler.pool.num_used_blocks == 0


def test_prompts_of_different_adapters_share_no_cache_blocks(root: Path) -> None:
    llm = new_llm(root)
    for name in NAMES:
        (cold,) = llm.chat(CONVERSATIONS[1], greedy_with(name))
        assert cold.cached_tokens == 0, name
        assert_same_completion(cold, reference_completion(root, 1, name))
    for name in NAMES:
        (warm,) = llm.chat(CONVERSATIONS[1], greedy_with(name))
        assert warm.cached_tokens > 32, name
        assert warm.seconds.vision == 0
        assert_same_completion(warm, reference_completion(root, 1, name))


def test_an_image_is_encoded_once_for_each_vision_tower(root: Path) -> None:
    llm = new_llm(root)
    llm.chat([CONVERSATIONS[1]] * 4, [greedy_with(name) for name in NAMES])
    stats = llm.engine_core.runner.encoder_cache.cache.stats
    assert stats.num_misses == 3  # "text" leaves the vision tower unchanged
    assert len(llm.engine_core.runner.encoder_cache.cache._embeddings) == 3


def test_embeddings_on_disk_are_keyed_by_adapter_weights_not_by_name(
    root: Path, tmp_path: Path
) -> None:
    def hits(adapter: Path) -> int:
        llm = LLM(
            MODEL,
            tiny_processor(),
            engine=EngineConfig(encoder_cache_dir=tmp_path),
            adapters={"adapter": adapter},
        )
        llm.chat(CONVERSATIONS[1], greedy_with("adapter"))
        return llm.engine_core.runner.encoder_cache.cache.stats.num_disk_hits

    assert hits(root / "vision") == 0
    assert hits(root / "other") == 0
    assert hits(root / "vision") == 1


def test_samples_and_the_second_turn_keep_the_adapter(root: Path) -> None:
    llm = new_llm(root)
    conversation_start = user(
        "Tell me a rather long story about this picture.", random_image(112, 112)
    )
    samples = llm.chat(
        [conversation_start], greedy_with("all", temperature=3.0, top_k=0, n=2, seed=5)
    )
    assert samples[1].cached_tokens > 32
    conversation = [conversation_start, {"role": "assistant", "content": "No."}, user("Why?")]
    (second,) = llm.chat(conversation, greedy_with("all"))
    assert second.cached_tokens > 32 and second.seconds.vision == 0
    assert_same_completion(second, merged_llm(root, "all").chat(conversation, GREEDY)[0])


def test_async_llm_takes_adapters(root: Path) -> None:
    engine = AsyncLLM(new_llm(root))

    async def chat_concurrently() -> list[Any]:
        return await asyncio.gather(*(engine.chat(CONVERSATIONS[1], greedy_with(n)) for n in NAMES))

    try:
        for name, (one,) in zip(NAMES, asyncio.run(chat_concurrently()), strict=True):
            assert_same_completion(one, reference_completion(root, 1, name))
    finally:
        engine.close()


def test_an_unmerged_adapter_beside_a_merged_one(root: Path) -> None:
    llm = LLM(
        root / "model",
        dtype="float32",
        adapter=root / "text",
        adapters={"e": root / "vision"},
    )
    (plain,) = llm.chat(CONVERSATIONS[1], GREEDY)
    assert_same_completion(plain, reference_completion(root, 1, "text"))
    assert llm.chat(CONVERSATIONS[1], greedy_with("e"))[0].token_ids != plain.token_ids


def test_adapters_on_a_quantized_model(root: Path) -> None:
    llm = LLM(root / "model", quantize="int8", adapters={"text": root / "text"})
    plain, adapted = llm.chat([CONVERSATIONS[1]] * 2, [GREEDY, greedy_with("text")])
    assert plain.token_ids != adapted.token_ids
    assert adapted.token_ids[:4] == reference_completion(root, 1, "text").token_ids[:4]


def test_an_unknown_adapter_name_is_rejected(root: Path) -> None:
    message = "adapter 'al': this LLM was not given it, it has all, text, vision"
    with pytest.raises(InputError, match=message):
        new_llm(root).chat(CONVERSATIONS[0], greedy_with("al"))
    with pytest.raises(InputError, match="'all': this LLM was not given it, it has none"):
        LLM(MODEL, tiny_processor()).chat(CONVERSATIONS[0], greedy_with("all"))
    with pytest.raises(InputError, match="adapter: got 3, must be the name of one"):
        SamplingParams(adapter=3)  # type: ignore[arg-type]


def test_a_missing_adapter_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        LLM(MODEL, tiny_processor(), adapters={"a": tmp_path / "nothing"})
