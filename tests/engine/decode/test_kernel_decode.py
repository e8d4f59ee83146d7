"""Decode steps through the kernel: the outputs of the forward, for one request and for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.decode.backend import DecodeToken
from qwen2vl.engine.decode.kernel_decode import KernelDecode
from qwen2vl.linear.cpu.library import VARIABLE
from tests.parity.reference import random_model
from tests.requirements import needs_kernels
from tests.tiny import tiny_config, tiny_processor

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)

pytestmark = needs_kernels


class CountingDecode(KernelDecode):
    """Counts the steps that it computes, by their number of requests."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.counts: list[int] = []

    def __call__(self, tokens: Sequence[DecodeToken]) -> Tensor:
        self.counts.append(len(tokens))
        return super().__call__(tokens)


def new_llm(kv_cache_dtype: Any = "auto") -> LLM:
    model = random_model(tiny_config(tie_word_embeddings=False))
    return LLM(model, tiny_processor(), kv_cache_dtype=kv_cache_dtype)


@pytest.fixture
def llm() -> LLM:
    return new_llm()


def use(llm: LLM, backend: KernelDecode | None) -> None:
    llm._resources.decode_backend = llm.engine_core.runner.decode_backend = backend
    llm.reset_caches()


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_requests_get_the_outputs_of_the_forward(kv_cache_dtype: str) -> None:
    llm = new_llm(kv_cache_dtype)
    conversations = [user("one question"), user("another"), user("and a third, a longer one")]
    use(llm, None)
    want = llm.chat(conversations, GREEDY)
    backend = CountingDecode(llm.model, 8)
    use(llm, backend)
    got = llm.chat(conversations, GREEDY)
    assert backend.counts[:10] == [3] * 10  # the first tokens come from prefill
    for ours, theirs in zip(got, want, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            # A number of an int8 cache may be rounded to the other side of a half.
            tolerance = 1e-4 if kv_cache_dtype == "auto" else 1e-2
            assert mine.logprob == pytest.approx(other.logprob, abs=tolerance)


def test_a_cpu_llm_uses_the_kernel(llm: LLM) -> None:
    backend = llm.engine_core.runner.decode_backend
    assert isinstance(backend, KernelDecode)
    assert backend.max_batch_size == llm.engine_config.max_num_seqs


def test_without_kernels_the_forward_runs(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    (want,) = llm.chat(user("one question"), GREEDY)
    monkeypatch.setenv(VARIABLE, "off")
    backend = CountingDecode(llm.model, 8)
    assert backend.max_batch_size == 0
    use(llm, backend)
    (got,) = llm.chat(user("one question"), GREEDY)
    assert backend.counts == []
    assert got.token_ids == want.token_ids


def test_a_replaced_weight_is_used_after_reset_caches(llm: LLM) -> None:
    llm.chat(user("one question"), GREEDY)
    layer = llm.model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())
    llm.reset_caches()
    (got,) = llm.chat(user("one question"), GREEDY)
    use(llm, None)
    (want,) = llm.chat(user("one question"), GREEDY)
    assert got.token_ids == want.token_ids


def test_weights_of_an_unsupported_kind_use_the_forward(llm: LLM) -> None:
    backend = CountingDecode(llm.model, 8)
    mlp = llm.model.model.layers[1].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
    use(llm, backend)
    assert backend.max_batch_size == 0
    (completion,) = llm.chat(user("one question"), GREEDY)
    assert len(completion.token_ids) == 12
    assert backend.counts == []


@pytest.mark.parametrize(
    ("quantize", "kv_cache_dtype"),
    [(None, "auto"), ("int8", "auto"), ("int4", "auto"), (None, "int8"), ("int8", "int8")],
)
def test_nano_gives_the_outputs_of_its_forward(quantize: Any, kv_cache_dtype: Any) -> None:
    llm = LLM("nano", dtype="float32", quantize=quantize, kv_cache_dtype=kv_cache_dtype)
    conversation = user("Write the numbers from one to twenty.")
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    (got,) = llm.chat(conversation, params)
    use(llm, None)
    (want,) = llm.chat(conversation, params)
    same = sum(a == b for a, b in zip(got.token_ids, want.token_ids, strict=True))
    is_rounded = quantize is not None or kv_cache_dtype != "auto"
    assert same >= 36 if is_rounded else same == 40
