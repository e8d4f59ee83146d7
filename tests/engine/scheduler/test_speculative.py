"""N-gram drafts: their lookup, their budget, and that they never change the output."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.scheduler.speculative import NgramProposer, _find_continuation
from qwen2vl.geometry import Grid
from tests.engine.kv_cache.test_block_pool import prompt
from tests.engine.scheduler.test_scheduler import make_request
from tests.engine.test_llm import random_image, user
from tests.engine.test_runner import (
    CONVERSATIONS,
    GREEDY,
    MODEL,
    assert_same_completion,
    new_llm,
    reference_completion,
)
from tests.tiny import tiny_processor


def brute_force_lookup(ids: list[int], length: int, max_tokens: int) -> list[int]:
    """Reference: try every earlier position, the latest first."""
    for first in range(len(ids) - 1, length - 1, -1):
        if ids[first - length : first] == ids[len(ids) - length :]:
            return ids[first : first + max_tokens]
    return []


@given(
    ids=st.lists(st.sampled_from([0, 1, 256, 257, 65536, 2**24 + 1]), min_size=1, max_size=40),
    length=st.integers(1, 4),
    max_tokens=st.integers(1, 5),
)
def test_lookup_finds_the_latest_earlier_occurrence(
    ids: list[int], length: int, max_tokens: int
) -> None:
    """Ids whose bytes overlap: the byte search must skip unaligned matches."""
    assert _find_continuation(array("i", ids).tobytes(), length, max_tokens) == brute_force_lookup(
        ids, length, max_tokens
    )


def test_repeated_tokens_are_proposed() -> None:
    request = make_request(prompt(*range(10, 20), 1, 2, 3), 50)
    request.all_token_ids += [10, 11, 12]
    assert NgramProposer(4).propose(request, 100) == [13, 14, 15]
    request.num_draft_tokens = request.num_accepted_tokens = 3
    assert NgramProposer(4).propose(request, 100) == [13, 14, 15, 16]
    assert NgramProposer(9).propose(request, 100) == list(range(13, 20)) + [1]
    assert NgramProposer(4).propose(request, 2) == [13, 14]
    assert NgramProposer(4).propose(request, 0) == []


def test_outputs_of_the_same_image_are_looked_up() -> None:
    image, other_image = (Grid(1, 4, 4), b"a" * 32), (Grid(1, 4, 4), b"b" * 32)
    drafter = NgramProposer(8)
    first = make_request(prompt(1, 2, image, 3, 4, 5, 6, 7, 8), 50)
    first.all_token_ids += [30, 31, 32, 33]
    drafter.add_finished(first)
    assert drafter.propose(make_request(prompt(9, image, 3, 4, 5, 6, 7, 8), 50), 4) == [30, 31, 32]
    assert drafter.propose(make_request(prompt(9, other_image, 3, 4, 5, 6, 7, 8), 50), 100) == []


def test_stored_outputs_are_bounded() -> None:
    drafter = NgramProposer(8)
    for n in range(200):
        request = make_request(prompt(1, (Grid(1, 4, 4), n.to_bytes(32, "big")), 2), 5000)
        request.all_token_ids += range(3000)
        drafter.add_finished(request)
    assert len(drafter._outputs) == 64
    assert all(len(ids) == 2048 for ids in drafter._outputs.values())


def test_rejected_drafts_exhaust_the_budget() -> None:
    request = make_request(prompt(*[1, 2, 3] * 5), 50)
    drafter = NgramProposer(4)
    assert drafter.propose(request, 100)
    num_rejected = 0
    while draft_tokens := drafter.propose(request, 100):
        request.num_draft_tokens += len(draft_tokens)
        num_rejected += 1
    assert num_rejected <= 3
    request.num_accepted_tokens = 2
    assert drafter.propose(request, 100)


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=1.5, top_k=3, seed=3, max_tokens=30, logprobs=0),
        SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=30, logprobs=0),
    ],
)
def test_draft_tokens_do_not_change_the_output(params: SamplingParams) -> None:
    """Sampled outputs too: each token comes from the same logits and the same draw."""
    llm = new_llm(num_speculative_tokens=5)
    for _ in range(2):  # the second time all outputs are in the lookup
        for index, completion in enumerate(llm.chat(CONVERSATIONS, params)):
            assert_same_completion(completion, reference_completion(index, params))


def test_a_repeated_request_takes_fewer_steps() -> None:
    llm = LLM(MODEL, tiny_processor(), engine=EngineConfig(num_speculative_tokens=7))
    conversation: list[Any] = [user("What is this?", random_image())]
    params = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True)

    def steps() -> int:
        core = llm.engine_core
        count, step = 0, core.step

        def counted() -> Any:
            nonlocal count
            count += 1
            return step()

        core.step = counted
        llm.chat(conversation, params)
        del core.step
        return count

    steps()
    assert steps() <= 8  # for 33 tokens
