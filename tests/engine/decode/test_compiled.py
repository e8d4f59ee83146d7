"""Steps of one answer through compiled blocks: the same answers, taken only where they fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.decode.compiled import SingleDecode
from qwen2vl.engine.decode.decoder import Token
from qwen2vl.linear import aot
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.scheme import quantize
from tests.parity.oracle import random_model
from tests.tiny import tiny_config, tiny_model, tiny_processor

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)


class Counting(SingleDecode):
    """Counts the steps that it computed."""

    count = 0

    def __call__(self, tokens: Sequence[Token]) -> Tensor:
        self.count += 1
        return super().__call__(tokens)


@pytest.fixture
def decode(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setattr(aot, "_compile", lambda graph, *_: graph)
    made = Counting.compiled(llm.model)
    assert isinstance(made, Counting)
    return made


def ask(words: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": words}]


def test_an_answer_alone_is_the_ordinary_answer(llm: LLM, decode: Counting) -> None:
    (want,) = llm.chat(ask("one question"), GREEDY)
    llm.forget()
    llm.runner.decode = decode
    try:
        (got,) = llm.chat(ask("one question"), GREEDY)
    finally:
        llm.runner.decode = None
    assert got.token_ids == want.token_ids
    assert decode.count == 11  # the first token is of the prompt
    assert got.logprobs is not None and want.logprobs is not None
    for ours, theirs in zip(got.logprobs, want.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_several_answers_go_the_ordinary_way_until_one_is_left(llm: LLM, decode: Counting) -> None:
    llm.runner.decode = decode
    lengths = (4, 9)
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    try:
        short, long = llm.chat([ask("a"), ask("b")], params)
    finally:
        llm.runner.decode = None
    assert (len(short.token_ids), len(long.token_ids)) == lengths
    assert decode.count == 5


def test_an_exchanged_weight_counts_once_the_llm_forgets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aot, "_compile", lambda graph, *_: graph)
    llm = LLM.of(random_model(tiny_config(tie_word_embeddings=False)), tiny_processor())
    llm._decode = llm.runner.decode = Counting.compiled(llm.model)
    llm.chat(ask("one question"), GREEDY)
    layer = llm.model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())
    llm.forget()
    (got,) = llm.chat(ask("one question"), GREEDY)
    llm.forget()
    llm.runner.decode = None
    (want,) = llm.chat(ask("one question"), GREEDY)
    assert got.token_ids == want.token_ids


def test_weights_that_cannot_be_compiled_for_go_the_ordinary_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aot, "_compile", lambda graph, *_: graph)
    llm = LLM.of(random_model(tiny_config(tie_word_embeddings=False)), tiny_processor())
    made = llm._decode = llm.runner.decode = Counting.compiled(llm.model)
    assert isinstance(made, Counting)
    monkeypatch.setattr(aot, "_compile", lambda *_: 1 / 0)
    quantize(llm.model, "int8")
    llm.forget()
    assert "not for single tokens here (division by zero)" in caplog.text
    (answer,) = llm.chat(ask("one question"), GREEDY)
    assert len(answer.token_ids) == 12
    assert made.count == 0


@pytest.mark.parametrize("works", [True, False])
def test_an_llm_that_compiles_decodes_quickly_where_that_works(
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
    assert isinstance(llm.runner.decode, SingleDecode) == works
    (answer,) = llm.chat(ask("Say something."), GREEDY)
    assert len(answer.token_ids) == 12


def test_without_a_compiler_it_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(aot, "_compile", broken)
    with caplog.at_level(logging.WARNING):
        assert SingleDecode.compiled(tiny_model()) is None
    said = [record.getMessage() for record in caplog.records if record.name.startswith("qwen2vl")]
    assert said == ["compile: not for single tokens here (no C++ compiler)"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_nano_compiled_answers_as_nano(quantize: Any) -> None:
    options: dict[str, Any] = {"dtype": "float32", "quantize": quantize}
    compiled = LLM("nano", compile=True, **options)
    assert isinstance(compiled._decode, SingleDecode)
    question = ask("Write the numbers from one to twenty.")
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    (got,) = compiled.chat(question, params)
    (want,) = LLM("nano", **options).chat(question, params)
    same = sum(a == b for a, b in zip(got.token_ids, want.token_ids, strict=True))
    assert same == 40 if quantize is None else same >= 36


def test_the_model_is_left_as_it_was(llm: LLM, decode: Counting) -> None:
    model: Qwen2VL = llm.model
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
