"""Decode through static buffers and CUDA graphs equals the model's forward, for any arena state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.engine import LLM
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.decode import cuda_graphs
from qwen2vl.engine.decode.backend import DecodeToken
from qwen2vl.engine.decode.cuda_graphs import CudaGraphDecode, StaticDecode
from qwen2vl.engine.decode.kernel_decode import KernelDecode
from qwen2vl.engine.kv_cache.arena import KVArena, SlotRange
from qwen2vl.engine.kv_cache.block_pool import BLOCK_SIZE
from qwen2vl.engine.kv_cache.storage import SeparateStorage
from qwen2vl.errors import ConfigError
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import KVCache, SequenceKVCaches
from tests.engine.test_runner import (
    CONVERSATIONS,
    ENGINE_LIMITS,
    GREEDY,
    MODEL,
    assert_same_completion,
    chat_until_interrupted,
    new_llm,
    reference_completion,
)
from tests.varlen import force_varlen

CONFIG = MODEL.config.text


class FakeGraph:
    """Stands in for a captured CUDA graph: replays a call."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.count = 0

    def replay(self) -> None:
        self.count += 1
        self.call()


class FakeCapture(CudaGraphDecode):
    """Captures fake graphs with the bookkeeping of the GPU class."""

    def _capture(self, batch_size: int, kv_length: int) -> Any:
        return FakeGraph(partial(self.forward, batch_size, kv_length))

    @property
    def num_replays(self) -> int:
        return sum(graph.count for graph in self._graphs.values())  # type: ignore[attr-defined]


@contextmanager
def llm_with_arena(supports_varlen: bool, min_kv_length: int = 64, **engine: Any) -> Iterator[LLM]:
    """Set up an LLM as on a GPU, with or without torch's varlen attention kernel."""
    with (
        force_varlen() if supports_varlen else nullcontext(),
        patch.object(cuda_graphs, "MIN_KV_LENGTH", min_kv_length),
    ):
        llm = new_llm(**engine)
        num_slots = llm._num_blocks * BLOCK_SIZE
        arena = KVArena(CONFIG, num_slots, torch.float32, torch.device("cpu"))
        arena.k_LKTC.fill_(torch.nan)
        arena.v_LKTC.fill_(torch.nan)
        llm._resources.kv_storage = arena
        llm._resources.decode_backend = FakeCapture(MODEL, arena, llm.engine_config.max_num_seqs)
        llm.engine.discard_core()
        yield llm


def arena_of(llm: LLM) -> KVArena:
    assert isinstance(llm._resources.kv_storage, KVArena)
    return llm._resources.kv_storage


def prompt(length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(0, CONFIG.vocab_size, (length,), generator=generator)
    return ids_T, torch.arange(length).expand(3, -1)


@torch.inference_mode()
def prefill(cache: KVCache, length: int, seed: int) -> None:
    """Fill a cache with a prompt by the model's forward; a range of an arena is a cache, too."""
    ids_T, positions_3T = prompt(length, seed)
    meta = AttnMeta.build([length])
    MODEL(ids_T, positions_3T, meta, caches=SequenceKVCaches([cache], meta))


@torch.inference_mode()
def decode_by_forward(cache: KVCache, token: int) -> Tensor:
    """Decode one token by the model's forward."""
    ids_T, positions_3T = torch.tensor([token]), torch.full((3, 1), cache.length)
    meta = AttnMeta.build([1], [cache.length + 1])
    return MODEL.logits(MODEL(ids_T, positions_3T, meta, caches=SequenceKVCaches([cache], meta)))[0]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    supports_varlen=st.booleans(),
    min_kv_length=st.sampled_from([1, 8, 512]),
)
def test_static_decode_equals_the_forward(
    lengths: list[int], supports_varlen: bool, min_kv_length: int
) -> None:
    """Ragged lengths, padded batches, KV lengths that grow; all unused slots are NaN."""
    with (
        force_varlen() if supports_varlen else nullcontext(),
        patch.object(cuda_graphs, "MIN_KV_LENGTH", min_kv_length),
    ):
        arena = KVArena(CONFIG, 128, torch.float32, torch.device("cpu"))
        arena.k_LKTC.fill_(torch.nan)
        arena.v_LKTC.fill_(torch.nan)
        decode = StaticDecode(MODEL, arena, 5)
        caches: list[SlotRange] = []
        references: list[KVCache] = []
        for seed, length in enumerate(lengths):
            caches.append(arena.reserve(None, length + 5, caches))
            references.append(KVCache.allocate(CONFIG, length + 5, torch.float32, "cpu"))
            prefill(caches[-1], length, seed)
            prefill(references[-1], length, seed)
        tokens = [3] * len(lengths)
        for _ in range(5):
            logits_RV = decode(
                [
                    DecodeToken(token, cache.length, cache)
                    for token, cache in zip(tokens, caches, strict=True)
                ]
            )
            want_RV = torch.stack(
                [
                    decode_by_forward(reference, token)
                    for reference, token in zip(references, tokens, strict=True)
                ]
            )
            torch.testing.assert_close(logits_RV, want_RV, rtol=0, atol=1e-5)
            tokens = logits_RV.argmax(dim=1).tolist()
            for cache in caches:
                cache.length += 1


@pytest.mark.parametrize("supports_varlen", [True, False])
def test_batched_in_an_arena_equals_alone(supports_varlen: bool) -> None:
    with llm_with_arena(supports_varlen) as llm:
        for index, completion in enumerate(llm.chat(CONVERSATIONS, GREEDY)):
            assert_same_completion(completion, reference_completion(index))
        assert (
            isinstance(llm._resources.decode_backend, FakeCapture)
            and llm._resources.decode_backend.num_replays > 3
        )


@settings(max_examples=12, deadline=None)
@given(supports_varlen=st.booleans(), **ENGINE_LIMITS)
def test_step_limits_do_not_change_the_output_in_an_arena(
    max_num_batched_tokens: int,
    max_num_encoder_patches: int,
    max_num_seqs: int,
    kv_cache_tokens: int,
    order: list[int],
    supports_varlen: bool,
) -> None:
    """Ranges are freed, reused, copied, grown, moved and preempted, beside other requests' ones."""
    limits: dict[str, Any] = {
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_num_encoder_patches": max_num_encoder_patches,
        "max_num_seqs": max_num_seqs,
        "kv_cache_tokens": kv_cache_tokens,
        "encoder_cache_bytes": 0,
    }
    with llm_with_arena(supports_varlen, min_kv_length=32, **limits) as llm:
        for _ in range(2):
            completions = llm.chat([CONVERSATIONS[i] for i in order], GREEDY)
            for index, completion in zip(order, completions, strict=True):
                assert_same_completion(completion, reference_completion(index))
        assert llm.engine_core.scheduler.pool.num_used_blocks == 0


def test_answers_stay_while_rows_are_moved() -> None:
    """Outputs of many lengths fragment the free slots, so that no free range is long enough."""
    rng = random.Random(0)
    params_choices = [replace(GREEDY, max_tokens=count) for count in (4, 30, 70)]
    with llm_with_arena(False, max_num_seqs=3, kv_cache_tokens=448) as llm:
        compact = arena_of(llm)._compact
        with patch.object(arena_of(llm), "_compact", side_effect=compact) as spy:
            for _ in range(6):
                order = rng.sample(range(len(CONVERSATIONS)), 6)
                params = [rng.choice(params_choices) for _ in order]
                completions = llm.chat([CONVERSATIONS[i] for i in order], params)
                for index, own_params, completion in zip(order, params, completions, strict=True):
                    assert_same_completion(completion, reference_completion(index, own_params))
        assert spy.call_count > 2


@pytest.mark.parametrize("supports_varlen", [True, False])
def test_draft_tokens_are_verified_by_the_forward(supports_varlen: bool) -> None:
    with llm_with_arena(supports_varlen, num_speculative_tokens=4) as llm:
        for _ in range(2):
            for index, completion in enumerate(llm.chat(CONVERSATIONS, GREEDY)):
                assert_same_completion(completion, reference_completion(index))


def test_adapters_are_computed_by_the_forward() -> None:
    """A captured step contains only the model's own layers."""
    with (
        llm_with_arena(False) as llm,
        patch.object(llm.engine_core.runner, "decode_backend", max_batch_size=8) as decode,
    ):
        (request,) = llm.create_requests(llm.processor(CONVERSATIONS[0]), GREEDY)
        adapter: Any = type(
            "LoraAdapter", (), {"deltas": {}, "digest": b"1", "vision_digest": b""}
        )()
        request.adapter = adapter
        llm.engine_core.scheduler.add_request(request)
        while llm.engine_core.scheduler.has_unfinished_requests:
            llm.step()
        assert tuple(request.output_token_ids) == reference_completion(0).token_ids
        decode.assert_not_called()


def test_an_llm_with_an_arena_is_usable_after_an_interrupt_at_any_line() -> None:
    files = (
        "block_pool.py",
        "scheduler.py",
        "runner.py",
        "engine_core.py",
        "llm.py",
        "arena.py",
        "cuda_graphs.py",
    )
    engine = {"kv_cache_tokens": 480, "max_num_batched_tokens": 64, "max_num_encoder_patches": 32}
    with llm_with_arena(False, **engine) as llm, patch("tests.engine.test_runner.FILES", files):
        rng = random.Random(0)
        for _ in range(20):
            with pytest.raises(KeyboardInterrupt):
                chat_until_interrupted(llm, rng)
            index = rng.randrange(6)
            assert_same_completion(
                llm.chat(CONVERSATIONS[index], GREEDY)[0], reference_completion(index)
            )
            assert llm.engine_core.scheduler.pool.num_used_blocks == 0


def test_an_interrupt_while_caches_are_moved_leaves_the_llm_usable() -> None:
    params = [replace(GREEDY, max_tokens=count) for count in (4, 30, 70)] * 24
    with llm_with_arena(False, kv_cache_tokens=448, max_num_seqs=3) as llm:
        core = llm.engine_core
        with (
            patch.object(arena_of(llm), "_move_down", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            llm.chat(CONVERSATIONS * 9, params)
        assert llm.engine_core is not core
        for index, completion in enumerate(llm.chat(CONVERSATIONS, GREEDY)):
            assert_same_completion(completion, reference_completion(index))


def test_each_batch_size_is_captured_once_and_again_after_a_weight_change() -> None:
    arena = KVArena(CONFIG, 64, torch.float32, torch.device("cpu"))
    decode = FakeCapture(MODEL, arena, 4)
    with patch.object(cuda_graphs, "MIN_KV_LENGTH", 8):
        cache = arena.reserve(None, 32, [])
        for length in range(9):
            cache.length = length
            decode([DecodeToken(1, length, cache)])
        assert sorted(decode._graphs) == [(1, 8), (1, 16)]
        assert decode.num_replays == 7  # the first call of each size runs eagerly
        caches = [cache]
        for length in (3, 5):
            caches.append(arena.reserve(None, 8, caches))
            caches[-1].length = length
        decode([DecodeToken(1, one.length, one) for one in caches])
        assert sorted(decode._graphs) == [(1, 8), (1, 16), (4, 16)]
    decode.on_weights_changed()
    assert not decode._graphs


def test_without_memory_to_capture_steps_run_eagerly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class OutOfMemoryCapture(FakeCapture):
        def _capture(self, batch_size: int, kv_length: int) -> Any:
            raise torch.OutOfMemoryError("full")

    arena = KVArena(CONFIG, 64, torch.float32, torch.device("cpu"))
    cache = arena.reserve(None, 32, [])
    plain, full = StaticDecode(MODEL, arena, 1), OutOfMemoryCapture(MODEL, arena, 1)
    for length in range(3):
        cache.length = length
        token = DecodeToken(1, length, cache)
        assert torch.equal(full([token]), plain([token]))
    warnings = [record for record in caplog.records if "is not captured" in record.getMessage()]
    assert len(warnings) == 1  # capture is not tried again


def test_reset_caches_drops_the_graphs() -> None:
    with llm_with_arena(False) as llm:
        llm.chat(CONVERSATIONS[0], GREEDY)
        assert (
            isinstance(llm._resources.decode_backend, FakeCapture)
            and llm._resources.decode_backend._graphs
        )
        llm.reset_caches()
        assert not llm._resources.decode_backend._graphs


def test_cuda_graphs_is_a_bool() -> None:
    assert EngineConfig().cuda_graphs and not EngineConfig(cuda_graphs=False).cuda_graphs
    with pytest.raises(ConfigError, match="cuda_graphs: got 2, must be True or False"):
        EngineConfig(cuda_graphs=2)  # type: ignore[arg-type]


def test_on_the_cpu_there_is_neither_arena_nor_cuda_graph() -> None:
    llm = new_llm()
    assert isinstance(llm._resources.kv_storage, SeparateStorage)
    assert isinstance(llm._resources.decode_backend, KernelDecode)
    llm.chat(CONVERSATIONS[0], GREEDY)
    assert not any(isinstance(cache, SlotRange) for cache in llm.engine_core.runner.caches.values())
