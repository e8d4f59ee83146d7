"""The engine on a GPU: with and without recorded steps, alone and in company, and who waits."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen2vl.engine import LLM
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.decode.cuda_graphs import DecodeGraphs, StaticDecode
from qwen2vl.engine.decode.decoder import Token
from qwen2vl.engine.kv_cache.arena import Arena, Range
from qwen2vl.engine.outputs import Completion
from qwen2vl.model import Qwen2VL
from tests.engine.test_runner import CONVERSATIONS, GREEDY, MODEL, alone, scores
from tests.gpu.device import GPU, needs_gpu
from tests.tiny import tiny_processor

pytestmark = needs_gpu


@cache
def model_in(dtype: torch.dtype) -> Qwen2VL:
    return deepcopy(MODEL).to(GPU, dtype)


def on_gpu(dtype: torch.dtype = torch.float32, **engine: Any) -> LLM:
    engine = {"cache_tokens": 4096, **engine}
    return LLM.of(model_in(dtype), tiny_processor(), engine=EngineConfig(**engine))


def assert_same(got: Completion, want: Completion) -> None:
    assert got.token_ids == want.token_ids
    np.testing.assert_allclose(scores(got), scores(want), rtol=0, atol=1e-3)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("num_drafts", [0, 4])
def test_answers_in_float32_are_those_of_the_cpu(graphs: bool, num_drafts: int) -> None:
    """Twice: the second time steps are replayed, and beginnings are found."""
    llm = on_gpu(graphs=graphs, num_drafts=num_drafts)
    for _ in range(2):
        for index, one in enumerate(llm.chat(CONVERSATIONS, GREEDY)):
            assert_same(one, alone(index))
    assert (llm._decode is not None) is graphs


def test_a_small_cache_in_which_rows_move_changes_no_answer() -> None:
    wishes = [replace(GREEDY, max_tokens=count) for count in (4, 30, 70)]
    llm = on_gpu(cache_tokens=448, max_sequences=3, max_step_tokens=64)
    for turn in range(4):
        params = [wishes[(turn + index) % 3] for index in range(len(CONVERSATIONS))]
        for index, one in enumerate(llm.chat(CONVERSATIONS, params)):
            assert_same(one, alone(index, params[index]))


@pytest.mark.parametrize("graphs", [True, False])
def test_most_tokens_in_bfloat16_are_those_of_one_alone(graphs: bool) -> None:
    together = on_gpu(torch.bfloat16, graphs=graphs).chat(CONVERSATIONS, GREEDY)
    same = 0
    for conversation, one in zip(CONVERSATIONS, together, strict=True):
        (by_itself,) = on_gpu(torch.bfloat16, graphs=graphs).chat(conversation, GREEDY)
        pairs = zip(one.token_ids, by_itself.token_ids, strict=True)
        same += sum(got == want for got, want in pairs)
    assert same >= 0.8 * sum(len(one.token_ids) for one in together)


def filled(dtype: torch.dtype, lengths: list[int]) -> tuple[Arena, list[Token]]:
    """Make an arena of rows that hold random keys and values."""
    config = MODEL.config.text
    arena = Arena(config, 2048, dtype, GPU)
    torch.manual_seed(0)
    arena.k_LKTC.normal_()
    arena.v_LKTC.normal_()
    tokens: list[Token] = []
    rows: list[Range] = []
    for number, length in enumerate(lengths):
        rows.append(arena.reserve(None, length + 8, rows))
        rows[-1].length = length
        tokens.append(Token(5 + number, length, rows[-1]))
    return arena, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_replayed_step_is_the_step(dtype: torch.dtype) -> None:
    arena, tokens = filled(dtype, [600, 3, 90, 512, 511])
    model = model_in(dtype)
    plain, recorded = StaticDecode(model, arena, 5), DecodeGraphs(model, arena, 5)
    want_RV = plain(tokens).clone()
    for _ in range(3):
        torch.testing.assert_close(recorded(tokens), want_RV, rtol=1e-3, atol=1e-3)
    others = [token._replace(id=token.id + 9) for token in tokens]
    want_RV = plain(others).clone()
    torch.testing.assert_close(recorded(others), want_RV, rtol=1e-3, atol=1e-3)
    assert len(recorded._graphs) == 1


@torch.inference_mode()
def test_the_packed_kernel_and_the_gathered_keys_agree() -> None:
    arena, tokens = filled(torch.bfloat16, [600, 3, 90])
    if not arena.packs:
        pytest.skip("this torch, or this GPU, has no packed kernel for ranges")
    model = model_in(torch.bfloat16)
    packed_RV = StaticDecode(model, arena, 3)(tokens).clone()
    arena.packs = False
    gathered_RV = StaticDecode(model, arena, 3)(tokens)
    torch.testing.assert_close(packed_RV, gathered_RV, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_nothing_in_a_decode_step_waits_for_the_gpu(dtype: torch.dtype) -> None:
    arena, tokens = filled(dtype, [600, 3, 90])
    model = model_in(dtype)
    for decode in (StaticDecode(model, arena, 3), DecodeGraphs(model, arena, 3)):
        decode(tokens)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits_RV: Tensor = decode(tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert logits_RV.isfinite().all()


def test_a_step_waits_once() -> None:
    """For the tokens, which the host must know; counted over a whole step of the engine."""
    llm = on_gpu(torch.bfloat16)
    params = replace(GREEDY, logprobs=None, max_tokens=40)
    for index in (0, 1, 2):
        for sequence in llm.sequences(llm.processor(CONVERSATIONS[index]), params):
            llm.scheduler.add(sequence)
    for _ in range(12):
        llm.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            llm.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1


def test_weights_changed_in_place_are_used_by_what_is_recorded() -> None:
    model = deepcopy(MODEL).to(GPU)
    engine = EngineConfig(cache_tokens=4096)
    llm = LLM.of(model, tiny_processor(), engine=engine)
    for _ in range(2):
        llm.chat(CONVERSATIONS[0], GREEDY)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-0.5)
    llm.forget()
    (again,) = llm.chat(CONVERSATIONS[0], GREEDY)
    (fresh,) = LLM.of(model, tiny_processor(), engine=engine).chat(CONVERSATIONS[0], GREEDY)
    assert_same(again, fresh)
