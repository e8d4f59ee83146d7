"""Several adapters in one engine: each request is answered as by a model with its own merged."""

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
from tests.engine.test_llm import picture, user
from tests.engine.test_runner import CONVERSATIONS, GREEDY, MODEL, assert_same
from tests.folders import write_tiny
from tests.tiny import tiny_processor

NAMES = (None, "all", "words", "eyes")
TARGETS = {"all": (*TEXT, *VISION, "lm_head"), "words": TEXT, "eyes": VISION}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    write_tiny(place / "model", model=MODEL)
    for seed, (name, targets) in enumerate(TARGETS.items(), 1):
        write_adapter(place / name, MODEL, targets, seed=seed)
    write_adapter(place / "other", MODEL, TARGETS["eyes"], seed=9)
    return place


def fresh(home: Path, **engine: Any) -> LLM:
    folders = {name: home / name for name in TARGETS}
    config = EngineConfig(**engine)
    return LLM.of(MODEL, tiny_processor(), engine=config, adapters=folders)


def wish(name: str | None, **changes: Any) -> SamplingParams:
    return replace(GREEDY, adapter=name, **changes)


@lru_cache
def merged(home: Path, name: str | None) -> LLM:
    folder = None if name is None else home / name
    return LLM(home / "model", dtype="float32", adapter=folder)


@lru_cache
def alone(home: Path, index: int, name: str | None) -> Completion:
    """The oracle: a model into which the adapter was merged."""
    llm = merged(home, name)
    llm.forget()
    return llm.chat(CONVERSATIONS[index], replace(GREEDY, adapter=None))[0]


def test_the_adapters_change_answers(home: Path) -> None:
    for index in (0, 1):
        answers = {alone(home, index, name).token_ids for name in NAMES}
        assert len(answers) >= 3 if index == 0 else len(answers) == 4


def test_each_is_answered_as_by_its_merged_model(home: Path) -> None:
    pairs = [(index, NAMES[index % 4]) for index in range(len(CONVERSATIONS))]
    pairs += [(1, name) for name in NAMES]
    llm = fresh(home)
    got = llm.chat([CONVERSATIONS[i] for i, _ in pairs], [wish(name) for _, name in pairs])
    for one, (index, name) in zip(got, pairs, strict=True):
        assert_same(one, alone(home, index, name))


@settings(max_examples=5, deadline=None)
@given(
    tokens=st.integers(32, 90),
    patches=st.integers(4, 90),
    sequences=st.integers(1, 4),
    cache=st.integers(320, 640),
    names=st.lists(st.sampled_from(NAMES), min_size=8, max_size=8),
    drafts=st.sampled_from([0, 4]),
)
def test_no_budget_changes_an_answer(
    home: Path,
    tokens: int,
    patches: int,
    sequences: int,
    cache: int,
    names: list[str | None],
    drafts: int,
) -> None:
    llm = fresh(
        home,
        max_step_tokens=tokens,
        max_step_patches=patches,
        max_sequences=sequences,
        cache_tokens=cache,
        num_drafts=drafts,
    )
    got = llm.chat(CONVERSATIONS, [wish(name) for name in names])
    for index, (one, name) in enumerate(zip(got, names, strict=True)):
        assert_same(one, alone(home, index, name))
    assert llm.scheduler.pool.num_busy == 0


def test_the_same_prompt_through_another_adapter_shares_nothing(home: Path) -> None:
    llm = fresh(home)
    for name in NAMES:
        (cold,) = llm.chat(CONVERSATIONS[1], wish(name))
        assert cold.cached_tokens == 0, name
        assert_same(cold, alone(home, 1, name))
    for name in NAMES:
        (warm,) = llm.chat(CONVERSATIONS[1], wish(name))
        assert warm.cached_tokens > 32, name
        assert warm.seconds.vision == 0
        assert_same(warm, alone(home, 1, name))


def test_a_picture_is_encoded_once_for_each_tower(home: Path) -> None:
    llm = fresh(home)
    llm.chat([CONVERSATIONS[1]] * 4, [wish(name) for name in NAMES])
    stats = llm.runner.shelf.cache.stats
    assert stats.misses == 3  # "words" sees what the model alone sees
    assert len(llm.runner.shelf.cache._rows) == 3


def test_rows_on_disk_are_those_of_the_adapter_not_of_its_name(home: Path, tmp_path: Path) -> None:
    def hits(folder: Path) -> int:
        llm = LLM.of(
            MODEL,
            tiny_processor(),
            engine=EngineConfig(vision_cache_dir=tmp_path),
            adapters={"it": folder},
        )
        llm.chat(CONVERSATIONS[1], wish("it"))
        return llm.runner.shelf.cache.stats.hits_disk

    assert hits(home / "eyes") == 0
    assert hits(home / "other") == 0
    assert hits(home / "eyes") == 1


def test_samples_and_the_second_turn_keep_the_adapter(home: Path) -> None:
    llm = fresh(home)
    question = user("Tell me a rather long story about this picture.", picture(112, 112))
    several = llm.chat([question], wish("all", temperature=3.0, top_k=0, n=2, seed=5))
    assert several[1].cached_tokens > 32
    talk = [question, {"role": "assistant", "content": "No."}, user("Why?")]
    (second,) = llm.chat(talk, wish("all"))
    assert second.cached_tokens > 32 and second.seconds.vision == 0
    assert_same(second, merged(home, "all").chat(talk, GREEDY)[0])


def test_asyncio_takes_them_too(home: Path) -> None:
    engine = AsyncLLM(fresh(home))

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(engine.chat(CONVERSATIONS[1], wish(n)) for n in NAMES))

    try:
        for name, (one,) in zip(NAMES, asyncio.run(all_at_once()), strict=True):
            assert_same(one, alone(home, 1, name))
    finally:
        engine.close()


def test_beside_a_merged_one(home: Path) -> None:
    llm = LLM(
        home / "model", dtype="float32", adapter=home / "words", adapters={"e": home / "eyes"}
    )
    (plain,) = llm.chat(CONVERSATIONS[1], GREEDY)
    assert_same(plain, alone(home, 1, "words"))
    assert llm.chat(CONVERSATIONS[1], wish("e"))[0].token_ids != plain.token_ids


def test_on_small_integers(home: Path) -> None:
    llm = LLM(home / "model", quantize="int8", adapters={"words": home / "words"})
    plain, adapted = llm.chat([CONVERSATIONS[1]] * 2, [GREEDY, wish("words")])
    assert plain.token_ids != adapted.token_ids
    assert adapted.token_ids[:4] == alone(home, 1, "words").token_ids[:4]


def test_a_name_that_is_not_there(home: Path) -> None:
    words = "adapter 'al': this LLM was not given it, it has all, eyes, words"
    with pytest.raises(InputError, match=words):
        fresh(home).chat(CONVERSATIONS[0], wish("al"))
    with pytest.raises(InputError, match="'all': this LLM was not given it, it has none"):
        LLM.of(MODEL, tiny_processor()).chat(CONVERSATIONS[0], wish("all"))
    with pytest.raises(InputError, match="adapter: got 3, must be the name of one"):
        SamplingParams(adapter=3)  # type: ignore[arg-type]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        LLM.of(MODEL, tiny_processor(), adapters={"a": tmp_path / "nothing"})
