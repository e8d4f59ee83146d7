"""Guesses come from the past, cost little where nothing repeats, and change no answer."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.speculative import Drafter, _continuation
from qwen2vl.geometry import Grid
from tests.engine.kv_cache.test_block_pool import prompt
from tests.engine.scheduler.test_scheduler import sequence
from tests.engine.test_llm import picture, user
from tests.engine.test_runner import CONVERSATIONS, GREEDY, MODEL, alone, assert_same, fresh
from tests.tiny import tiny_processor


def slowly(ids: list[int], length: int, most: int) -> list[int]:
    """The oracle: try every earlier place, the latest first."""
    for first in range(len(ids) - 1, length - 1, -1):
        if ids[first - length : first] == ids[len(ids) - length :]:
            return ids[first : first + most]
    return []


@given(
    ids=st.lists(st.sampled_from([0, 1, 256, 257, 65536, 2**24 + 1]), min_size=1, max_size=40),
    length=st.integers(1, 4),
    most=st.integers(1, 5),
)
def test_the_lookup_is_the_latest_earlier_place(ids: list[int], length: int, most: int) -> None:
    """Ids whose bytes overlap: a search in bytes must not be fooled."""
    assert _continuation(array("i", ids).tobytes(), length, most) == slowly(ids, length, most)


def test_a_sequence_that_repeats_is_guessed() -> None:
    one = sequence(prompt(*range(10, 20), 1, 2, 3), 50)
    one.ids += [10, 11, 12]
    assert Drafter(4)(one, 100) == [13, 14, 15]
    one.num_drafted = one.num_accepted = 3
    assert Drafter(4)(one, 100) == [13, 14, 15, 16]
    assert Drafter(9)(one, 100) == list(range(13, 20)) + [1]
    assert Drafter(4)(one, 2) == [13, 14]
    assert Drafter(4)(one, 0) == []


def test_an_answer_about_the_same_picture_is_remembered() -> None:
    seen, other = (Grid(1, 4, 4), b"a" * 32), (Grid(1, 4, 4), b"b" * 32)
    drafter = Drafter(8)
    first = sequence(prompt(1, 2, seen, 3, 4, 5, 6, 7, 8), 50)
    first.ids += [30, 31, 32, 33]
    drafter.learn(first)
    assert drafter(sequence(prompt(9, seen, 3, 4, 5, 6, 7, 8), 50), 4) == [30, 31, 32]
    assert drafter(sequence(prompt(9, other, 3, 4, 5, 6, 7, 8), 50), 100) == []


def test_what_is_remembered_is_bounded() -> None:
    drafter = Drafter(8)
    for n in range(200):
        one = sequence(prompt(1, (Grid(1, 4, 4), n.to_bytes(32, "big")), 2), 5000)
        one.ids += range(3000)
        drafter.learn(one)
    assert len(drafter._answers) == 64
    assert all(len(ids) == 2048 for ids in drafter._answers.values())


def test_whose_guesses_fail_is_left_alone() -> None:
    one = sequence(prompt(*[1, 2, 3] * 5), 50)
    drafter = Drafter(4)
    assert drafter(one, 100)
    vain = 0
    while found := drafter(one, 100):
        one.num_drafted += len(found)
        vain += 1
    assert vain <= 3
    one.num_accepted = 2
    assert drafter(one, 100)


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=1.5, top_k=3, seed=3, max_tokens=30, logprobs=0),
        SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=30, logprobs=0),
    ],
)
def test_guesses_change_no_answer(params: SamplingParams) -> None:
    """Also sampled ones: each token is drawn from the same scores with the same draw."""
    llm = fresh(num_drafts=5)
    for _ in range(2):  # the second time everything is remembered
        for index, one in enumerate(llm.chat(CONVERSATIONS, params)):
            assert_same(one, alone(index, params))


def test_a_repeated_question_takes_fewer_steps() -> None:
    llm = LLM.of(MODEL, tiny_processor(), engine=EngineConfig(num_drafts=7))
    question: list[Any] = [user("What is this?", picture())]
    params = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True)

    def steps() -> int:
        count, step = 0, llm.step

        def counted() -> Any:
            nonlocal count
            count += 1
            return step()

        llm.step = counted
        llm.chat(question, params)
        del llm.step
        return count

    steps()
    assert steps() <= 8  # for 33 tokens
