"""Streamed videos: as if decoded at once, encoded once, shared with shorter and longer ones."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from qwen2vl.engine import LLM, Completion, EngineConfig, SamplingParams
from qwen2vl.engine.kv_cache.block_pool import BLOCK_SIZE
from qwen2vl.errors import InputError
from qwen2vl.processor.video import frame_pairs
from qwen2vl.processor.video.frame_pairs import FramePairStream
from tests.parity.reference import random_model
from tests.tiny import tiny_config, tiny_processor

MODEL = random_model(tiny_config())
GREEDY = SamplingParams(temperature=0, max_tokens=5, logprobs=0)
SIZE = 56
TOKENS = 4  # of a frame pair


def frames(count: int, seed: int = 0) -> np.ndarray:
    """Frames of noise, (count, 56, 56, 3): those of a shorter video are the first ones."""
    sizes = (SIZE, SIZE, 3)
    return np.stack(
        [
            np.random.default_rng([seed, i]).integers(0, 256, sizes, dtype=np.uint8)
            for i in range(count)
        ]
    )


def question(video: Any, text: str = "What?", **options: Any) -> list[dict[str, Any]]:
    media = {"type": "video", "video": video, "max_frames": 10_000, "total_pixels": 10**9} | options
    return [{"role": "user", "content": [media, {"type": "text", "text": text}]}]


def new_llm(*, streams: bool = True, **engine: Any) -> LLM:
    config = EngineConfig(streamed_video_bytes=0 if streams else 2**40, **engine)
    return LLM(MODEL, tiny_processor(), engine=config)


@lru_cache
def reference_completion(count: int, text: str = "What?") -> Completion:
    return new_llm(streams=False).chat(question(frames(count), text), GREEDY)[0]


def logprobs(completion: Completion) -> list[float]:
    return [entry.logprob for entry in completion.logprobs or ()]


def assert_same(got: Completion, want: Completion) -> None:
    assert got.token_ids == want.token_ids
    np.testing.assert_allclose(logprobs(got), logprobs(want), rtol=0, atol=1e-5)


def num_encoded(llm: LLM) -> int:
    """Return how many frame pairs were encoded."""
    stats = llm.stats()
    return stats.encoder_cache_queries - stats.encoder_cache_hits


@pytest.fixture(autouse=True)
def _few_buffered_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_pairs, "MAX_BUFFERED_BYTES", 5 * 2 * SIZE * SIZE * 3)


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_a_streamed_video_equals_one_decoded_at_once(count: int) -> None:
    llm = new_llm(streams=True, max_num_batched_tokens=64, max_num_encoder_patches=100)
    assert_same(llm.chat(question(frames(count)), GREEDY)[0], reference_completion(count))


@pytest.mark.parametrize("streams", [True, False])
def test_a_video_that_has_grown_is_encoded_where_it_is_new(streams: bool) -> None:
    llm = new_llm(streams=streams)
    for count, total in ((40, 20), (46, 23), (30, 23)):
        assert_same(llm.chat(question(frames(count)), GREEDY)[0], reference_completion(count))
        assert num_encoded(llm) == total


@pytest.mark.parametrize("streams", [True, False])
def test_a_video_that_has_grown_shares_the_blocks_of_its_beginning(streams: bool) -> None:
    """Also of a streamed one, whose digests are not known when it is admitted."""
    llm = new_llm(streams=streams)
    llm.chat(question(frames(40)), GREEDY)
    (completion,) = llm.chat(question(frames(46)), GREEDY)
    assert completion.cached_tokens >= 20 * TOKENS - BLOCK_SIZE
    assert_same(completion, reference_completion(46))
    assert llm.engine_core.scheduler.pool.num_used_blocks == 0


def test_a_second_question_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = new_llm()
    video = frames(60)
    llm.chat(question(video), GREEDY)
    monkeypatch.setattr(FramePairStream, "prefetch", None)
    (completion,) = llm.chat(question(video, "And now?"), GREEDY)
    assert completion.cached_tokens >= 30 * TOKENS - BLOCK_SIZE
    assert_same(completion, reference_completion(60, "And now?"))


def test_equal_frames_are_encoded_once() -> None:
    still = np.repeat(frames(1), 30, axis=0)
    llm = new_llm()
    (completion,) = llm.chat(question(still), GREEDY)
    assert num_encoded(llm) == 1
    assert_same(completion, new_llm(streams=False).chat(question(still), GREEDY)[0])


def test_several_completions_of_one_video() -> None:
    params = replace(GREEDY, n=3, temperature=1.0, seed=1)
    got = new_llm().chat(question(frames(40)), params)
    want = new_llm(streams=False).chat(question(frames(40)), params)
    assert [one.token_ids for one in got] == [one.token_ids for one in want]


def test_a_preempted_request_decodes_again() -> None:
    conversations = [question(frames(40, seed)) for seed in range(3)]
    params = replace(GREEDY, max_tokens=150, ignore_eos=True)
    llm = new_llm(kv_cache_tokens=600, encoder_cache_bytes=0)
    completions = llm.chat(conversations, params)
    assert llm.stats().num_preemptions > 0
    for conversation, completion in zip(conversations, completions, strict=True):
        assert_same(completion, new_llm(streams=False).chat(conversation, params)[0])


def test_embeddings_are_freed_once_they_are_computed() -> None:
    """Without a cache of embeddings there are never more than those of one step."""
    llm = new_llm(encoder_cache_bytes=0, max_num_batched_tokens=32)
    prepared = llm.prepare(question(frames(100)), GREEDY)
    cache = llm.engine_core.encoder_cache.cache
    sizes: list[int] = []
    put = cache.put

    def recording(*args: Any) -> None:
        put(*args)
        sizes.append(cache.stats.num_bytes)

    cache.put = recording
    llm.generate_prepared([prepared])
    pair_bytes = TOKENS * MODEL.config.text.hidden_size * 4
    assert len(sizes) == 50 and max(sizes) <= 9 * pair_bytes
    assert cache.stats.num_bytes == 0


def test_a_video_that_cannot_be_decoded_fails_its_request_only() -> None:
    class Damaged(list[Any]):
        """Frames of which one cannot be opened."""

    images = [*frames(41)]
    bad: list[Any] = [*images[:30], b"no image", *images[31:]]
    llm = new_llm()
    prompts = [question(Damaged(bad)), question(frames(40))]
    failed, good = llm.chat(prompts, GREEDY)
    assert failed.finish_reason == "error"
    assert "frames[30]" in (failed.error or "")
    assert_same(good, reference_completion(40))
    with pytest.raises(InputError, match=r"frames\[30\]"):
        llm.chat(question(Damaged(bad)), GREEDY)


def test_an_abandoned_stream_ends_decoding() -> None:
    llm = new_llm(max_num_batched_tokens=32)
    before = threading.active_count()
    stream = llm.stream(question(frames(200)), GREEDY)
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < end, "a thread is left"
        time.sleep(0.01)


def test_embed_streams_too() -> None:
    messages = question(frames(40))
    got, want = (new_llm(streams=streams).embed([messages]) for streams in (True, False))
    torch.testing.assert_close(got, want)


def test_salts_do_not_share_streamed_pairs() -> None:
    llm = new_llm()
    for salt in (b"a", b"b"):
        prompt = llm.processor(question(frames(20)), cache_salt=salt)
        llm.generate(prompt, GREEDY)
    assert num_encoded(llm) == 20
