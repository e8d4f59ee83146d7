"""Single-token decode through compiled blocks: equal outputs, used only where it applies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.decode.backend import DecodeToken
from qwen2vl.engine.decode.compiled import CompiledDecode
from qwen2vl.linear import aot
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.scheme import quantize
from tests.parity.reference import random_model
from tests.tiny import tiny_config, tiny_model, tiny_processor

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)


class CountingDecode(CompiledDecode):
    """Counts the steps that it computes."""

    count = 0

    def __call__(self, tokens: Sequence[DecodeToken]) -> Tensor:
        self.count += 1
        return super().__call__(tokens)


@pytest.fixture
def decode(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> CountingDecode:
    monkeypatch.setattr(aot, "_compile", lambda graph, *_: graph)
    backend = CountingDecode.try_compile(llm.model)
    assert isinstance(backend, CountingDecode)
    return backend


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_a_single_request_gets_the_output_of_the_forward(llm: LLM, decode: CountingDecode) -> None:
    (want,) = llm.chat(user("one question"), GREEDY)
    llm.reset_caches()
    llm.engine_core.runner.decode_backend = decode
    try:
        (got,) = llm.chat(user("one question"), GREEDY)
    finally:
        llm.engine_core.runner.decode_backend = None
    assert got.token_ids == want.token_ids
    assert decode.count == 11  # the first token comes from prefill
    assert got.logprobs is not None and want.logprobs is not None
    for ours, theirs in zip(got.logprobs, want.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_several_requests_use_the_forward_until_one_is_left(
    llm: LLM, decode: CountingDecode
) -> None:
    llm.engine_core.runner.decode_backend = decode
    lengths = (4, 9)
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    try:
        short, long = llm.chat([user("a"), user("b")], params)
    finally:
        llm.engine_core.runner.decode_backend = None
    assert (len(short.token_ids), len(long.token_ids)) == lengths
    assert decode.count == 5


def test_a_replaced_weight_is_used_after_reset_caches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aot, "_compile", lambda graph, *_: graph)
    llm = LLM(random_model(tiny_config(tie_word_embeddings=False)), tiny_processor())
    llm._resources.decode_backend = llm.engine_core.runner.decode_backend = (
        CountingDecode.try_compile(llm.model)
    )
    llm.chat(user("one question"), GREEDY)
    layer = llm.model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())
    llm.reset_caches()
    (got,) = llm.chat(user("one question"), GREEDY)
    llm.reset_caches()
    llm.engine_core.runner.decode_backend = None
    (want,) = llm.chat(user("one question"), GREEDY)
    assert got.token_ids == want.token_ids


def test_weights_that_cannot_be_compiled_for_use_the_forward(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aot, "_compile", lambda graph, *_: graph)
    llm = LLM(random_model(tiny_config(tie_word_embeddings=False)), tiny_processor())
    backend = llm._resources.decode_backend = llm.engine_core.runner.decode_backend = (
        CountingDecode.try_compile(llm.model)
    )
    assert isinstance(backend, CountingDecode)
    monkeypatch.setattr(aot, "_compile", lambda *_: 1 / 0)
    quantize(llm.model, "int8")
    llm.reset_caches()
    assert "single-token decode could not be compiled (division by zero)" in caplog.text
    (completion,) = llm.chat(user("one question"), GREEDY)
    assert len(completion.token_ids) == 12
    assert backend.count == 0


@pytest.mark.parametrize("works", [True, False])
def test_an_llm_with_compile_uses_the_backend_where_compilation_works(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiler(graph: Any, *_: Any) -> Any:
        if not works:
            raise RuntimeError("broken")
        return graph

    monkeypatch.setattr(aot, "_compile", compiler)
    monkeypatch.setattr(torch, "compile", lambda plain, **_: plain)
    llm = LLM("nano", compile=True)
    assert llm.compile_seconds is not None
    assert isinstance(llm.engine_core.runner.decode_backend, CompiledDecode) == works
    (completion,) = llm.chat(user("Say something."), GREEDY)
    assert len(completion.token_ids) == 12


def test_without_a_compiler_a_warning_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(aot, "_compile", broken)
    with caplog.at_level(logging.WARNING):
        assert CompiledDecode.try_compile(tiny_model()) is None
    warnings = [
        record.getMessage() for record in caplog.records if record.name.startswith("qwen2vl")
    ]
    assert warnings == [
        "compile: single-token decode could not be compiled (no C++ compiler); computing eagerly"
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_compiled_nano_gives_the_outputs_of_nano(quantize: Any) -> None:
    options: dict[str, Any] = {"dtype": "float32", "quantize": quantize}
    compiled = LLM("nano", compile=True, **options)
    assert isinstance(compiled._resources.decode_backend, CompiledDecode)
    conversation = user("Write the numbers from one to twenty.")
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    (got,) = compiled.chat(conversation, params)
    (want,) = LLM("nano", **options).chat(conversation, params)
    same = sum(a == b for a, b in zip(got.token_ids, want.token_ids, strict=True))
    assert same == 40 if quantize is None else same >= 36


def test_the_model_is_not_modified(llm: LLM, decode: CountingDecode) -> None:
    model: Qwen2VL = llm.model
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
