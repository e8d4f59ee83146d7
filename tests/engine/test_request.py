"""Stop conditions of a request, and which text is released when."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.engine.request import Request, StopStringBuffer
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.sampling.sampler import ResolvedSamplingParams, Sampler
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.tokenizer import IncrementalDetokenizer
from qwen2vl.weights import GenerationDefaults
from tests.tiny import tiny_tokenizer

EOS = 7  # a byte that the texts below do not hold


def prompt(length: int = 5) -> ModelInput:
    return ModelInput(
        input_ids=list(range(length)),
        items=(),
        position_ids_3T=torch.arange(length).expand(3, length),
        rope_delta=0,
        placeholder_index_M=torch.empty(0, dtype=torch.int64),
    )


def greedy_sampler() -> Sampler:
    rule = ResolvedSamplingParams.resolve(SamplingParams(temperature=0), GenerationDefaults())
    return Sampler(rule, [], vocab_size=300, device=torch.device("cpu"))


def make_request(params: SamplingParams, *, max_model_len: int = 1000) -> Request:
    return Request(
        prompt(),
        params,
        IncrementalDetokenizer(tiny_tokenizer()),
        greedy_sampler(),
        stop_token_ids=frozenset({EOS, *params.stop_token_ids}),
        max_model_len=max_model_len,
    )


def feed(request: Request, ids: list[int]) -> list[str]:
    """Append tokens until the request finishes; return the pieces of text released."""
    pieces = []
    for token in ids:
        pieces.append(request.append(token))
        if request.finish_reason:
            break
    return pieces


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer().encode_text(text)


def truncate_at_stop_string(text: str, stops: list[str]) -> str | None:
    """Reference: truncate character by character; None if no stop string occurs."""
    for end in range(1, len(text) + 1):
        matched = [stop for stop in stops if text[:end].endswith(stop)]
        if matched:
            return text[: end - max(map(len, matched))]
    return None


texts = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


@given(text=texts, stops=stops, data=st.data())
def test_stop_strings_do_not_depend_on_token_boundaries(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    buffer = StopStringBuffer(stops)
    released, stopped = "", None
    want = truncate_at_stop_string(text, stops)
    for piece in pieces:
        more, stopped = buffer.push(piece)
        released += more
        assert (text if want is None else want).startswith(released), "released too early"
        if stopped:
            break
    if not stopped:
        released += buffer.flush()
    assert (stopped is not None) == (want is not None)
    assert stopped is None or text.startswith(released + stopped)
    assert released == (text if want is None else want)


@given(text=texts)
def test_without_stop_strings_nothing_is_held_back(text: str) -> None:
    assert StopStringBuffer([]).push(text) == (text, None)


def test_only_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    buffer = StopStringBuffer(["\nUser:"])
    assert buffer.push("Hello\nUs") == ("Hello", None)
    assert buffer.push("ual") == ("\nUsual", None)
    assert buffer.push("\nUser: more") == ("", "\nUser:")


def test_the_end_token_finishes_and_is_counted() -> None:
    request = make_request(SamplingParams())
    assert feed(request, [*ids_of("Hi"), EOS, *ids_of("never")]) == ["H", "i", ""]
    completion = request.completion()
    assert completion.text == "Hi"
    assert completion.finish_reason == "stop"
    assert completion.token_ids == (*ids_of("Hi"), EOS)
    assert completion.stop_reason is None


def test_the_stop_reason_is_the_stop_string_or_token() -> None:
    by_string = make_request(SamplingParams(stop=["c", "bc"]))
    feed(by_string, ids_of("abcd"))
    assert by_string.completion().stop_reason == "bc"
    (token,) = ids_of("b")
    by_token = make_request(SamplingParams(stop_token_ids=[token]))
    feed(by_token, ids_of("abcd"))
    assert (by_token.completion().text, by_token.completion().stop_reason) == ("a", token)
    cut = make_request(SamplingParams(stop=["x"], max_tokens=2))
    feed(cut, ids_of("abcd"))
    assert cut.completion().stop_reason is None


def test_max_tokens_finishes_with_length() -> None:
    request = make_request(SamplingParams(max_tokens=3))
    assert feed(request, ids_of("abcdef")) == ["a", "b", "c"]
    assert request.finish_reason == "length"


def test_max_model_len_finishes_with_length() -> None:
    request = make_request(SamplingParams(max_tokens=500), max_model_len=9)
    feed(request, ids_of("abcdefghij"))
    assert request.finish_reason == "length"
    assert request.text == "abcd"


def test_the_end_token_at_max_tokens_is_a_stop() -> None:
    request = make_request(SamplingParams(max_tokens=2))
    feed(request, [*ids_of("a"), EOS])
    assert request.finish_reason == "stop"


def test_a_stop_string_truncates_the_text_and_not_the_tokens() -> None:
    request = make_request(SamplingParams(stop=["END"]))
    pieces = feed(request, ids_of("one END two"))
    assert "".join(pieces) == request.text == "one "
    assert request.finish_reason == "stop"
    assert request.completion().token_ids == tuple(ids_of("one END"))


def test_held_back_text_is_released_at_the_end() -> None:
    request = make_request(SamplingParams(stop=["END"], max_tokens=2))
    assert feed(request, ids_of("EN")) == ["", "EN"]
    ended = make_request(SamplingParams(stop=["END"]))
    assert feed(ended, [*ids_of("EN"), EOS]) == ["", "", "EN"]


def test_no_delta_ends_inside_a_character() -> None:
    euro = "\N{EURO SIGN}"
    raw = [tiny_tokenizer().encode_text(chr(0xD800 - 1))]  # three bytes, three tokens
    assert len(raw[0]) == 3
    request = make_request(SamplingParams())
    assert feed(request, raw[0])[:2] == ["", ""]
    assert request.text == chr(0xD800 - 1)
    cut = make_request(SamplingParams(max_tokens=2))
    feed(cut, raw[0])
    assert cut.text == "\ufffd"
    assert feed(make_request(SamplingParams()), ids_of(euro)) == [euro]


def test_a_stop_string_completed_by_a_final_partial_character() -> None:
    request = make_request(SamplingParams(stop=["\ufffd"], max_tokens=2))
    feed(request, tiny_tokenizer().encode_text("a" + chr(0xD800 - 1)))
    assert request.text == "a"


def test_a_finished_request_takes_no_more_tokens() -> None:
    request = make_request(SamplingParams(max_tokens=1))
    feed(request, ids_of("a"))
    with pytest.raises(AssertionError, match="finished"):
        request.append(ids_of("b")[0])
