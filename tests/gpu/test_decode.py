"""Engine on a GPU: outputs with and without CUDA graphs, alone and batched; synchronizations."""

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
from qwen2vl.engine.decode.backend import DecodeToken
from qwen2vl.engine.decode.cuda_graphs import CudaGraphDecode, StaticDecode
from qwen2vl.engine.kv_cache.arena import KVArena, SlotRange
from qwen2vl.engine.outputs import Completion
from qwen2vl.model import Qwen2VL
from tests.engine.test_runner import CONVERSATIONS, GREEDY, MODEL, logprobs, reference_completion
from tests.gpu.device import GPU, needs_gpu
from tests.tiny import tiny_processor

pytestmark = needs_gpu


@cache
def gpu_model(dtype: torch.dtype) -> Qwen2VL:
    return deepcopy(MODEL).to(GPU, dtype)


def gpu_llm(dtype: torch.dtype = torch.float32, **engine: Any) -> LLM:
    engine = {"kv_cache_tokens": 4096, **engine}
    return LLM(gpu_model(dtype), tiny_processor(), engine=EngineConfig(**engine))


def assert_same_completion(got: Completion, expected: Completion) -> None:
    assert got.token_ids == expected.token_ids
    np.testing.assert_allclose(logprobs(got), logprobs(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("num_speculative_tokens", [0, 4])
def test_float32_outputs_equal_those_of_the_cpu(
    cuda_graphs: bool, num_speculative_tokens: int
) -> None:
    """Twice: the second time graphs are replayed and prefixes are cached."""
    llm = gpu_llm(cuda_graphs=cuda_graphs, num_speculative_tokens=num_speculative_tokens)
    for _ in range(2):
        for index, completion in enumerate(llm.chat(CONVERSATIONS, GREEDY)):
            assert_same_completion(completion, reference_completion(index))
    assert (llm._resources.decode_backend is not None) is cuda_graphs


def test_compaction_of_a_small_kv_cache_does_not_change_the_output() -> None:
    variants = [replace(GREEDY, max_tokens=count) for count in (4, 30, 70)]
    llm = gpu_llm(kv_cache_tokens=448, max_num_seqs=3, max_num_batched_tokens=64)
    for round_index in range(4):
        params = [variants[(round_index + index) % 3] for index in range(len(CONVERSATIONS))]
        for index, completion in enumerate(llm.chat(CONVERSATIONS, params)):
            assert_same_completion(completion, reference_completion(index, params[index]))


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_most_bfloat16_tokens_equal_those_of_single_requests(cuda_graphs: bool) -> None:
    together = gpu_llm(torch.bfloat16, cuda_graphs=cuda_graphs).chat(CONVERSATIONS, GREEDY)
    num_equal = 0
    for conversation, completion in zip(CONVERSATIONS, together, strict=True):
        (alone,) = gpu_llm(torch.bfloat16, cuda_graphs=cuda_graphs).chat(conversation, GREEDY)
        pairs = zip(completion.token_ids, alone.token_ids, strict=True)
        num_equal += sum(got == expected for got, expected in pairs)
    assert num_equal >= 0.8 * sum(len(completion.token_ids) for completion in together)


def make_filled_arena(dtype: torch.dtype, lengths: list[int]) -> tuple[KVArena, list[DecodeToken]]:
    """Build an arena with allocated ranges that hold random keys and values."""
    config = MODEL.config.text
    arena = KVArena(config, 2048, dtype, GPU)
    torch.manual_seed(0)
    arena.k_LKTC.normal_()
    arena.v_LKTC.normal_()
    tokens: list[DecodeToken] = []
    ranges: list[SlotRange] = []
    for number, length in enumerate(lengths):
        ranges.append(arena.reserve(None, length + 8, ranges))
        ranges[-1].length = length
        tokens.append(DecodeToken(5 + number, length, ranges[-1]))
    return arena, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_replayed_graph_equals_the_eager_step(dtype: torch.dtype) -> None:
    arena, tokens = make_filled_arena(dtype, [600, 3, 90, 512, 511])
    model = gpu_model(dtype)
    eager, graphed = StaticDecode(model, arena, 5), CudaGraphDecode(model, arena, 5)
    expected_RV = eager(tokens).clone()
    for _ in range(3):
        torch.testing.assert_close(graphed(tokens), expected_RV, rtol=1e-3, atol=1e-3)
    other_tokens = [token._replace(id=token.id + 9) for token in tokens]
    expected_RV = eager(other_tokens).clone()
    torch.testing.assert_close(graphed(other_tokens), expected_RV, rtol=1e-3, atol=1e-3)
    assert len(graphed._graphs) == 1


@torch.inference_mode()
def test_varlen_kernel_and_gathered_keys_agree() -> None:
    arena, tokens = make_filled_arena(torch.bfloat16, [600, 3, 90])
    if not arena.supports_varlen:
        pytest.skip("this torch, or this GPU, has no varlen kernel for ranges")
    model = gpu_model(torch.bfloat16)
    varlen_RV = StaticDecode(model, arena, 3)(tokens).clone()
    arena.supports_varlen = False
    gathered_RV = StaticDecode(model, arena, 3)(tokens)
    torch.testing.assert_close(varlen_RV, gathered_RV, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_decode_step_does_not_synchronize(dtype: torch.dtype) -> None:
    arena, tokens = make_filled_arena(dtype, [600, 3, 90])
    model = gpu_model(dtype)
    for decode in (StaticDecode(model, arena, 3), CudaGraphDecode(model, arena, 3)):
        decode(tokens)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits_RV: Tensor = decode(tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert logits_RV.isfinite().all()


def test_an_engine_step_synchronizes_once() -> None:
    """To copy the sampled tokens to the host; counted over a whole engine step."""
    llm = gpu_llm(torch.bfloat16)
    params = replace(GREEDY, logprobs=None, max_tokens=40)
    for index in (0, 1, 2):
        for request in llm.create_requests(llm.processor(CONVERSATIONS[index]), params):
            llm.engine_core.scheduler.add_request(request)
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


def test_reset_caches_after_changing_weights_recaptures_the_graphs() -> None:
    model = deepcopy(MODEL).to(GPU)
    engine = EngineConfig(kv_cache_tokens=4096)
    llm = LLM(model, tiny_processor(), engine=engine)
    for _ in range(2):
        llm.chat(CONVERSATIONS[0], GREEDY)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-0.5)
    llm.reset_caches()
    (got,) = llm.chat(CONVERSATIONS[0], GREEDY)
    (expected_completion,) = LLM(model, tiny_processor(), engine=engine).chat(
        CONVERSATIONS[0], GREEDY
    )
    assert_same_completion(got, expected_completion)
