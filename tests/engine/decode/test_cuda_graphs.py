"""Decode through fixed buffers gives what the ordinary step gives, whatever lies in the arena."""

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
from qwen2vl.engine.decode.cuda_graphs import DecodeGraphs, StaticDecode
from qwen2vl.engine.decode.decoder import Token
from qwen2vl.engine.kv_cache.arena import Arena, Range
from qwen2vl.engine.kv_cache.block_pool import BLOCK
from qwen2vl.errors import ConfigError
from qwen2vl.geometry import AttnMeta
from qwen2vl.model.attention import KVCache
from tests.engine.test_runner import (
    BUDGETS,
    CONVERSATIONS,
    GREEDY,
    MODEL,
    alone,
    assert_same,
    chat_until_interrupted,
    fresh,
)
from tests.varlen import with_varlen

CONFIG = MODEL.config.text


class Replayed:
    """What is recorded here: a call in place of a graph."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.count = 0

    def replay(self) -> None:
        self.count += 1
        self.call()


class Recorded(DecodeGraphs):
    """Records as on a GPU, and keeps the same books."""

    def _recorded(self, size: int, room: int) -> Any:
        return Replayed(partial(self.forward, size, room))

    @property
    def num_replays(self) -> int:
        return sum(graph.count for graph in self._graphs.values())  # type: ignore[attr-defined]


@contextmanager
def in_arena(packs: bool, least_room: int = 64, **engine: Any) -> Iterator[LLM]:
    """Set an LLM up as on a GPU: with torch's packed kernel, or as where torch has none."""
    with (
        with_varlen() if packs else nullcontext(),
        patch.object(cuda_graphs, "LEAST_ROOM", least_room),
    ):
        llm = fresh(**engine)
        num_blocks = llm.scheduler.pool.num_blocks
        llm._arena = Arena(CONFIG, num_blocks * BLOCK, torch.float32, torch.device("cpu"))
        llm._arena.k_LKTC.fill_(torch.nan)
        llm._arena.v_LKTC.fill_(torch.nan)
        llm._decode = Recorded(MODEL, llm._arena, llm.scheduler.limits.sequences)
        llm._begin(num_blocks)
        yield llm


def prompt(length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(0, CONFIG.vocab_size, (length,), generator=generator)
    return ids_T, torch.arange(length).expand(3, -1)


@torch.inference_mode()
def read(cache: KVCache, length: int, seed: int) -> None:
    """Fill a cache with a prompt in the ordinary way; a range of an arena is a cache, too."""
    ids_T, positions_3T = prompt(length, seed)
    MODEL(ids_T, positions_3T, AttnMeta.build([length]), caches=[cache])


@torch.inference_mode()
def step_alone(cache: KVCache, token: int) -> Tensor:
    """Decode one token in the ordinary way."""
    ids_T, positions_3T = torch.tensor([token]), torch.full((3, 1), cache.length)
    meta = AttnMeta.build([1], [cache.length + 1])
    return MODEL.logits(MODEL(ids_T, positions_3T, meta, caches=[cache]))[0]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    packs=st.booleans(),
    least_room=st.sampled_from([1, 8, 512]),
)
def test_static_decode_is_the_ordinary_step(
    lengths: list[int], packs: bool, least_room: int
) -> None:
    """Ragged rows, padded batches, rooms that are outgrown; every place but the rows is NaN."""
    with (
        with_varlen() if packs else nullcontext(),
        patch.object(cuda_graphs, "LEAST_ROOM", least_room),
    ):
        arena = Arena(CONFIG, 128, torch.float32, torch.device("cpu"))
        arena.k_LKTC.fill_(torch.nan)
        arena.v_LKTC.fill_(torch.nan)
        decode = StaticDecode(MODEL, arena, 5)
        rows: list[Range] = []
        oracles: list[KVCache] = []
        for seed, length in enumerate(lengths):
            rows.append(arena.reserve(None, length + 5, rows))
            oracles.append(KVCache.allocate(CONFIG, length + 5, torch.float32, "cpu"))
            read(rows[-1], length, seed)
            read(oracles[-1], length, seed)
        tokens = [3] * len(lengths)
        for _ in range(5):
            logits_RV = decode(
                [Token(token, row.length, row) for token, row in zip(tokens, rows, strict=True)]
            )
            want_RV = torch.stack(
                [step_alone(oracle, token) for oracle, token in zip(oracles, tokens, strict=True)]
            )
            torch.testing.assert_close(logits_RV, want_RV, rtol=0, atol=1e-5)
            tokens = logits_RV.argmax(dim=1).tolist()
            for row in rows:
                row.length += 1


@pytest.mark.parametrize("packs", [True, False])
def test_batched_in_an_arena_is_alone(packs: bool) -> None:
    with in_arena(packs) as llm:
        for index, one in enumerate(llm.chat(CONVERSATIONS, GREEDY)):
            assert_same(one, alone(index))
        assert isinstance(llm._decode, Recorded) and llm._decode.num_replays > 3


@settings(max_examples=12, deadline=None)
@given(packs=st.booleans(), **BUDGETS)
def test_no_budget_changes_an_answer_in_an_arena(
    tokens: int, patches: int, sequences: int, cache: int, order: list[int], packs: bool
) -> None:
    """Rows freed and used again, copied, widened, moved, preempted; keys of others all around."""
    budgets: dict[str, Any] = {
        "max_step_tokens": tokens,
        "max_step_patches": patches,
        "max_sequences": sequences,
        "cache_tokens": cache,
        "vision_cache_bytes": 0,
    }
    with in_arena(packs, least_room=32, **budgets) as llm:
        for _ in range(2):
            answers = llm.chat([CONVERSATIONS[i] for i in order], GREEDY)
            for index, one in zip(order, answers, strict=True):
                assert_same(one, alone(index))
        assert llm.scheduler.pool.num_busy == 0


def test_answers_stay_while_rows_are_moved() -> None:
    """Of many lengths, so that what is free lies in pieces, none of them wide enough."""
    rng = random.Random(0)
    wishes = [replace(GREEDY, max_tokens=count) for count in (4, 30, 70)]
    with in_arena(False, max_sequences=3, cache_tokens=448) as llm:
        assert llm._arena is not None
        close_up = llm._arena._close_up
        with patch.object(llm._arena, "_close_up", side_effect=close_up) as spy:
            for _ in range(6):
                order = rng.sample(range(len(CONVERSATIONS)), 6)
                params = [rng.choice(wishes) for _ in order]
                answers = llm.chat([CONVERSATIONS[i] for i in order], params)
                for index, wish, one in zip(order, params, answers, strict=True):
                    assert_same(one, alone(index, wish))
        assert spy.call_count > 2


@pytest.mark.parametrize("packs", [True, False])
def test_guesses_go_the_ordinary_way(packs: bool) -> None:
    with in_arena(packs, num_drafts=4) as llm:
        for _ in range(2):
            for index, one in enumerate(llm.chat(CONVERSATIONS, GREEDY)):
                assert_same(one, alone(index))


def test_an_adapter_goes_the_ordinary_way() -> None:
    """A recorded step knows the model's own layers alone."""
    with in_arena(False) as llm, patch.object(llm.runner, "decode", most=8) as decode:
        (sequence,) = llm.sequences(llm.processor(CONVERSATIONS[0]), GREEDY)
        adapter: Any = type("Adapter", (), {"gains": {}, "digest": b"1", "vision_digest": b""})()
        sequence.adapter = adapter
        llm.scheduler.add(sequence)
        while llm.scheduler.has_work:
            llm.step()
        assert tuple(sequence.token_ids) == alone(0).token_ids
        decode.assert_not_called()


def test_an_interrupt_at_any_line_leaves_an_llm_with_an_arena_ready() -> None:
    files = ("blocks.py", "scheduler.py", "runner.py", "llm.py", "arena.py", "graphs.py")
    engine = {"cache_tokens": 480, "max_step_tokens": 64, "max_step_patches": 32}
    with in_arena(False, **engine) as llm, patch("tests.engine.test_runner.FILES", files):
        rng = random.Random(0)
        for _ in range(20):
            with pytest.raises(KeyboardInterrupt):
                chat_until_interrupted(llm, rng)
            index = rng.randrange(6)
            assert_same(llm.chat(CONVERSATIONS[index], GREEDY)[0], alone(index))
            assert llm.scheduler.pool.num_busy == 0


def test_an_interrupt_between_moves_costs_what_is_kept_and_nothing_else() -> None:
    wishes = [replace(GREEDY, max_tokens=count) for count in (4, 30, 70)] * 24
    with in_arena(False, cache_tokens=448, max_sequences=3) as llm:
        with (
            patch.object(llm._arena, "_move", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            llm.chat(CONVERSATIONS * 9, wishes)
        assert llm.runner.is_torn
        for index, one in enumerate(llm.chat(CONVERSATIONS, GREEDY)):
            assert_same(one, alone(index))
        assert not llm.runner.is_torn


def test_each_size_is_recorded_once_and_again_when_weights_are_others() -> None:
    arena = Arena(CONFIG, 64, torch.float32, torch.device("cpu"))
    decode = Recorded(MODEL, arena, 4)
    with patch.object(cuda_graphs, "LEAST_ROOM", 8):
        row = arena.reserve(None, 32, [])
        for length in range(9):
            row.length = length
            decode([Token(1, length, row)])
        assert sorted(decode._graphs) == [(1, 8), (1, 16)]
        assert decode.num_replays == 7  # the first of a size is computed as it is
        others = [row]
        for length in (3, 5):
            others.append(arena.reserve(None, 8, others))
            others[-1].length = length
        decode([Token(1, one.length, one) for one in others])
        assert sorted(decode._graphs) == [(1, 8), (1, 16), (4, 16)]
    decode.forget()
    assert not decode._graphs


def test_without_memory_to_record_steps_are_computed_as_they_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Full(Recorded):
        def _recorded(self, size: int, room: int) -> Any:
            raise torch.OutOfMemoryError("full")

    arena = Arena(CONFIG, 64, torch.float32, torch.device("cpu"))
    row = arena.reserve(None, 32, [])
    plain, full = StaticDecode(MODEL, arena, 1), Full(MODEL, arena, 1)
    for length in range(3):
        row.length = length
        token = Token(1, length, row)
        assert torch.equal(full([token]), plain([token]))
    said = [record for record in caplog.records if "is not recorded" in record.getMessage()]
    assert len(said) == 1  # and it is not tried again


def test_forgetting_forgets_the_recordings() -> None:
    with in_arena(False) as llm:
        llm.chat(CONVERSATIONS[0], GREEDY)
        assert isinstance(llm._decode, Recorded) and llm._decode._graphs
        llm.forget()
        assert not llm._decode._graphs


def test_graphs_are_on_or_off() -> None:
    assert EngineConfig().graphs and not EngineConfig(graphs=False).graphs
    with pytest.raises(ConfigError, match="graphs: got 2, must be True or False"):
        EngineConfig(graphs=2)  # type: ignore[arg-type]


def test_on_the_cpu_there_is_neither_arena_nor_recording() -> None:
    llm = fresh()
    assert llm._arena is None and llm._decode is None
    llm.chat(CONVERSATIONS[0], GREEDY)
    assert not any(isinstance(cache, Range) for cache in llm.runner.caches.values())
