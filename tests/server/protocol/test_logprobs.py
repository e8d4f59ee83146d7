"""Log probabilities in OpenAI's two forms."""

from __future__ import annotations

import math

import pytest

from qwen2vl.engine.outputs import TokenLogprob
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.server.protocol.logprobs import (
    chat_logprobs,
    completion_logprobs,
    end_token_ids,
    token_text,
    without_end_token,
)
from tests.tiny import tiny_processor


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_processor().tokenizer


def logprobs_of(tokenizer: Tokenizer, text: str) -> list[TokenLogprob]:
    ids = tokenizer.encode_text(text)
    return [
        TokenLogprob(token_id=token, logprob=-i - 0.5, top=((token, -i - 0.5), (ids[0], -99.0)))
        for i, token in enumerate(ids)
    ]


def test_chat(tokenizer: Tokenizer) -> None:
    found = chat_logprobs(logprobs_of(tokenizer, "a\u00e9"), tokenizer).content
    assert b"".join(bytes(one.bytes or []) for one in found) == "a\u00e9".encode()
    assert found[0].token == "a" and found[0].logprob == -0.5
    assert [top.token for top in found[0].top_logprobs] == ["a", "a"]


def test_completion(tokenizer: Tokenizer) -> None:
    found = completion_logprobs(logprobs_of(tokenizer, "xyz"), tokenizer, offset=5)
    assert found.tokens == ["x", "y", "z"] and found.text_offset == [5, 6, 7]
    assert found.token_logprobs == [-0.5, -1.5, -2.5]
    assert found.top_logprobs[1] == {"y": -1.5, "x": -99.0}


def test_bytes_of_part_of_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text("\u00e9")
    if len(ids) > 1:
        assert [token_text(token, tokenizer) for token in ids] == ["\\xc3", "\\xa9"]


def test_a_probability_of_zero(tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode_text("a")
    one = TokenLogprob(token_id=token, logprob=-math.inf, top=((token, -math.inf),))
    found = chat_logprobs([one], tokenizer).content[0]
    assert found.logprob == found.top_logprobs[0].logprob == -9999.0


def test_the_end_token_is_left_out(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<|im_end|>")
    ends = end_token_ids(tokenizer, [5])
    assert {end, 5} <= ends and tokenizer.token_to_id("<|box_start|>") not in ends
    logprobs = [TokenLogprob(token_id=i, logprob=-1.0, top=()) for i in (7, end)]
    assert without_end_token(logprobs, "stop", ends) == logprobs[:1]
    assert without_end_token(logprobs, "length", ends) == logprobs
    assert without_end_token(logprobs, None, ends) == logprobs
    assert without_end_token(logprobs[:1], "stop", ends) == logprobs[:1]
    assert without_end_token([], "stop", ends) == []
