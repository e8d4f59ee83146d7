"""How an answer ends and which text is released when."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.engine.request import Sequence, StopBuffer
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.sampling.sampler import Rule, Sampler
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.tokenizer import TextStream
from qwen2vl.weights import GenerationDefaults
from tests.tiny import tiny_tokenizer

EOS = 7  # a byte that the texts below do not hold


def prompt(length: int = 5) -> ModelInput:
    return ModelInput(
        input_ids=list(range(length)),
        items=(),
        position_ids_3T=torch.arange(length).expand(3, length),
        rope_delta=0,
        pad_index_M=torch.empty(0, dtype=torch.int64),
    )


def greedy() -> Sampler:
    rule = Rule.resolve(SamplingParams(temperature=0), GenerationDefaults())
    return Sampler(rule, [], vocab_size=300, device=torch.device("cpu"))


def sequence(params: SamplingParams, *, max_model_len: int = 1000) -> Sequence:
    return Sequence(
        prompt(),
        params,
        TextStream(tiny_tokenizer()),
        greedy(),
        end_ids=frozenset({EOS}),
        max_model_len=max_model_len,
    )


def feed(made: Sequence, ids: list[int]) -> list[str]:
    """Append until the answer is over; return the pieces released."""
    pieces = []
    for token in ids:
        pieces.append(made.append(token))
        if made.finish_reason:
            break
    return pieces


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer().encode_text(text)


def cut_one_by_one(text: str, stops: list[str]) -> str | None:
    """The oracle: the answer so far, character by character; None if nothing stops it."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))]
    return None


texts = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


@given(text=texts, stops=stops, data=st.data())
def test_stop_texts_do_not_depend_on_token_borders(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    buffer = StopBuffer(stops)
    shown, stopped = "", False
    want = cut_one_by_one(text, stops)
    for piece in pieces:
        more, stopped = buffer.push(piece)
        shown += more
        assert (text if want is None else want).startswith(shown), "released too early"
        if stopped:
            break
    if not stopped:
        shown += buffer.flush()
    assert stopped == (want is not None)
    assert shown == (text if want is None else want)


@given(text=texts)
def test_without_stop_texts_nothing_is_held_back(text: str) -> None:
    assert StopBuffer([]).push(text) == (text, False)


def test_only_a_possible_beginning_is_held_back() -> None:
    buffer = StopBuffer(["\nUser:"])
    assert buffer.push("Hello\nUs") == ("Hello", False)
    assert buffer.push("ual") == ("\nUsual", False)
    assert buffer.push("\nUser: more") == ("", True)


def test_the_end_token_ends_and_is_counted() -> None:
    made = sequence(SamplingParams())
    assert feed(made, [*ids_of("Hi"), EOS, *ids_of("never")]) == ["H", "i", ""]
    answer = made.completion()
    assert answer.text == "Hi"
    assert answer.finish_reason == "stop"
    assert answer.token_ids == (*ids_of("Hi"), EOS)


def test_max_tokens_ends_with_length() -> None:
    made = sequence(SamplingParams(max_tokens=3))
    assert feed(made, ids_of("abcdef")) == ["a", "b", "c"]
    assert made.finish_reason == "length"


def test_the_context_ends_with_length() -> None:
    made = sequence(SamplingParams(max_tokens=500), max_model_len=9)
    feed(made, ids_of("abcdefghij"))
    assert made.finish_reason == "length"
    assert made.text == "abcd"


def test_the_end_token_on_the_last_place_is_a_stop() -> None:
    made = sequence(SamplingParams(max_tokens=2))
    feed(made, [*ids_of("a"), EOS])
    assert made.finish_reason == "stop"


def test_a_stop_text_cuts_before_itself_and_keeps_the_tokens() -> None:
    made = sequence(SamplingParams(stop=["END"]))
    pieces = feed(made, ids_of("one END two"))
    assert "".join(pieces) == made.text == "one "
    assert made.finish_reason == "stop"
    assert made.completion().token_ids == tuple(ids_of("one END"))


def test_what_was_held_back_comes_out_at_the_end() -> None:
    made = sequence(SamplingParams(stop=["END"], max_tokens=2))
    assert feed(made, ids_of("EN")) == ["", "EN"]
    ended = sequence(SamplingParams(stop=["END"]))
    assert feed(ended, [*ids_of("EN"), EOS]) == ["", "", "EN"]


def test_no_delta_ends_inside_a_character() -> None:
    euro = "\N{EURO SIGN}"
    raw = [tiny_tokenizer().encode_text(chr(0xD800 - 1))]  # three bytes, three tokens
    assert len(raw[0]) == 3
    made = sequence(SamplingParams())
    assert feed(made, raw[0])[:2] == ["", ""]
    assert made.text == chr(0xD800 - 1)
    cut = sequence(SamplingParams(max_tokens=2))
    feed(cut, raw[0])
    assert cut.text == "\ufffd"
    assert feed(sequence(SamplingParams()), ids_of(euro)) == [euro]


def test_a_stop_text_completed_by_the_last_broken_character() -> None:
    made = sequence(SamplingParams(stop=["\ufffd"], max_tokens=2))
    feed(made, tiny_tokenizer().encode_text("a" + chr(0xD800 - 1)))
    assert made.text == "a"


def test_nothing_is_appended_to_a_finished_answer() -> None:
    made = sequence(SamplingParams(max_tokens=1))
    feed(made, ids_of("a"))
    with pytest.raises(AssertionError, match="over"):
        made.append(ids_of("b")[0])
