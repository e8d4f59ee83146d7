"""Cache salts: prompts of different salts share no KV blocks, embeddings or draft tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.engine.kv_cache.block_pool import BlockHashes, salted_digest
from qwen2vl.engine.validation import with_cache_identity
from tests.engine.test_runner import (
    CONVERSATIONS,
    GREEDY,
    assert_same_completion,
    new_llm,
    reference_completion,
)

SALTS = (b"", b"a", b"b", b"a" * 2000)


def run(llm: Any, salt: bytes, index: int = 6) -> Any:
    prompt = replace(llm.processor(CONVERSATIONS[index]), cache_salt=salt)
    (completion,) = llm.generate(prompt, GREEDY)
    assert_same_completion(completion, reference_completion(index))
    return completion


def test_only_prompts_of_one_salt_share_kv_blocks_and_embeddings() -> None:
    llm = new_llm()
    for salt in SALTS:
        before = llm.stats()
        first = run(llm, salt)
        assert first.cached_tokens == 0
        assert llm.stats().encoder_cache_hits == before.encoder_cache_hits
    for salt in SALTS:
        assert run(llm, salt).cached_tokens > 0


def test_embeddings_on_disk_are_salted(tmp_path: Path) -> None:
    hits: list[int] = []
    for salt in (b"", b"a", b"a", b"b", b""):
        llm = new_llm(encoder_cache_dir=str(tmp_path))
        run(llm, salt)
        hits.append(llm.stats().encoder_cache_hits)
        llm.close()
    assert hits == [0, 0, 1, 0, 1]


def test_embedding_prompts_does_not_share_either() -> None:
    llm = new_llm()
    prompt = llm.processor(CONVERSATIONS[1])
    for salt in (b"a", b"b", b""):
        llm.embed_prompts([replace(prompt, cache_salt=salt)], llm.engine_core)
    assert llm.stats().encoder_cache_hits == 0
    llm.embed_prompts([replace(prompt, cache_salt=b"b")], llm.engine_core)
    assert llm.stats().encoder_cache_hits == 1


def test_a_prompt_without_salt_and_adapter_keeps_its_digests() -> None:
    prompt = new_llm().processor(CONVERSATIONS[1])
    assert with_cache_identity(prompt, None) is prompt


@given(
    ids=st.lists(st.integers(0, 9), min_size=32, max_size=80),
    salts=st.lists(st.binary(max_size=200), min_size=2, max_size=2, unique=True),
    digest=st.sampled_from([b"", bytes(32), b"x" * 32]),
)
def test_no_block_hash_is_shared_between_salts(
    ids: list[int], salts: list[bytes], digest: bytes
) -> None:
    prompt = new_prompt(ids)
    one, other = (
        BlockHashes(replace(prompt, cache_salt=salt), digest).extend(ids) for salt in salts
    )
    assert len(one) == len(ids) // 32 and not set(one) & set(other)


def test_salt_and_data_are_not_confused() -> None:
    digests = [salted_digest(a, b) for a in (b"", b"a", b"ab") for b in (b"", b"b", b"ab", b"a")]
    assert len(set(digests)) == len(digests)


def new_prompt(ids: list[int]) -> Any:
    prompt = _LLM.processor(CONVERSATIONS[0])
    return replace(prompt, input_ids=ids)


_LLM = new_llm()
