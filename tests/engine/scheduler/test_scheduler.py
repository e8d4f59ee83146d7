"""The scheduler without a model, with a fake encoder cache that encodes immediately."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen2vl.engine.kv_cache.block_pool import (
    BLOCK_SIZE,
    BlockPool,
    CopySlots,
    FreeSlots,
    ReserveSlots,
)
from qwen2vl.engine.request import Request
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.sampling.sampler import ResolvedSamplingParams, Sampler
from qwen2vl.engine.scheduler.output import SampledTokens, SchedulerOutput, StepLimits
from qwen2vl.engine.scheduler.scheduler import Scheduler
from qwen2vl.errors import EngineError
from qwen2vl.geometry import Grid
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.tokenizer import IncrementalDetokenizer
from qwen2vl.weights import GenerationDefaults
from tests.engine.kv_cache.test_block_pool import prompt
from tests.tiny import tiny_tokenizer

GREEDY = ResolvedSamplingParams.resolve(SamplingParams(temperature=0), GenerationDefaults())


def make_request(prompt_input: ModelInput, max_tokens: int = 4) -> Request:
    return Request(
        prompt_input,
        SamplingParams(max_tokens=max_tokens),
        IncrementalDetokenizer(tiny_tokenizer()),
        Sampler(GREEDY, [], vocab_size=300, device=torch.device("cpu")),
        stop_token_ids=frozenset(),
        max_model_len=10_000,
    )


class FakeEncoderCache:
    """Counts references; frame pairs are encoded once they were scheduled."""

    def __init__(self) -> None:
        self.num_references: Counter[bytes] = Counter()
        self.encoded: set[bytes] = set()

    def acquire(self, digests: Sequence[bytes]) -> None:
        self.num_references.update(digests)

    def release(self, digest: bytes) -> None:
        self.num_references[digest] -= 1
        assert self.num_references[digest] >= 0
        if not self.num_references[digest]:
            self.encoded.discard(digest)

    def discard(self, digests: Sequence[bytes]) -> None:
        pass

    def has_embeddings(self, digest: bytes) -> bool:
        return digest in self.encoded


class FakeEngine:
    """Executes scheduler outputs: applies cache operations, checks chunks, samples letters."""

    def __init__(self, blocks: int = 64, **limits: int) -> None:
        self.encoder_cache = FakeEncoderCache()
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, self.encoder_cache, StepLimits(**limits))
        self.cached_ids: dict[int, list[int]] = {}  # allocation id -> tokens in its KV cache
        self.capacities: dict[int, int] = {}

    def step(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        self.scheduler.update_from_output(output, self.run(output))
        return output

    def run(self, output: SchedulerOutput) -> list[SampledTokens | EngineError]:
        while output.cache_operations:
            match output.cache_operations.popleft():
                case ReserveSlots(allocation_id, tokens):
                    self.cached_ids.setdefault(allocation_id, [])
                    self.capacities[allocation_id] = tokens
                case CopySlots(source, target, tokens):
                    self.cached_ids[target] = self.cached_ids[source][:tokens]
                case FreeSlots(allocation_id):
                    del self.cached_ids[allocation_id], self.capacities[allocation_id]
        for one in output.encoder_inputs:
            assert one.digest not in self.encoder_cache.encoded, "encoded twice"
            assert self.encoder_cache.num_references[one.digest] > 0
            self.encoder_cache.encoded.add(one.digest)
        results: list[SampledTokens | EngineError] = []
        for chunk in output.token_chunks:
            request = chunk.request
            assert request.allocation is not None
            cached = self.cached_ids[request.allocation.id]
            assert cached[: chunk.start] == request.all_token_ids[: chunk.start], (
                "the KV cache holds other tokens"
            )
            for _, item, index in request.prompt.pairs_between(chunk.start, chunk.stop):
                assert self.encoder_cache.has_embeddings(item.pair_digests[index])
            cached[chunk.start :] = chunk.input_ids
            assert len(cached) <= self.capacities[request.allocation.id]
            sampled = [(ord("a") + len(request.all_token_ids) % 26, None)]
            results.append(sampled if chunk.num_logits else [])
        return results

    def finish(self) -> int:
        steps = 0
        while self.scheduler.has_unfinished_requests:
            self.step()
            steps += 1
        return steps


def text(length: int, first: int = 0) -> ModelInput:
    return prompt(*range(first, first + length))


def test_chunked_prefill_runs_beside_decoding_requests() -> None:
    engine = FakeEngine(max_num_batched_tokens=50)
    short, long = make_request(text(10), 6), make_request(text(140, 1000), 2)
    engine.scheduler.add_request(short)
    engine.step()
    engine.scheduler.add_request(long)
    scheduled = []
    while long.finish_reason is None:
        output = engine.step()
        scheduled.append({id(c.request): len(c.input_ids) for c in output.token_chunks})
    assert [tokens.get(id(long)) for tokens in scheduled] == [49, 49, 42, 1]
    assert all(tokens[id(short)] == 1 for tokens in scheduled[:3])


def test_first_come_first_served() -> None:
    engine = FakeEngine(max_num_batched_tokens=1000, max_num_seqs=2)
    requests = [make_request(text(20, 100 * i), 3) for i in range(5)]
    for request in requests:
        engine.scheduler.add_request(request)
    order: list[int] = []
    while engine.scheduler.has_unfinished_requests:
        engine.step()
        order += [
            i for i, request in enumerate(requests) if request.finish_reason and i not in order
        ]
    assert order == [0, 1, 2, 3, 4]


def test_a_chunk_ends_where_embeddings_are_missing() -> None:
    """A video of 5 frame pairs of 64 patches, 16 tokens each; a step's budget is two of them."""
    video = (Grid(5, 8, 8), b"c" * 32)
    engine = FakeEngine(max_num_batched_tokens=1000, max_num_encoder_patches=128)
    request = make_request(prompt(*range(7), video, *range(9)), 1)
    engine.scheduler.add_request(request)
    stops = []
    while engine.scheduler.has_unfinished_requests:
        output = engine.step()
        stops.append(
            [one.index for one in output.encoder_inputs] + [c.stop for c in output.token_chunks]
        )
    assert stops == [[0, 1, 7 + 32], [2, 3, 7 + 64], [4, 7 + 80 + 9]]
    assert not +engine.encoder_cache.num_references


def test_frame_pairs_are_held_only_until_they_are_computed() -> None:
    video = (Grid(40, 8, 8), b"c" * 32)  # 16 tokens each
    engine = FakeEngine(max_num_batched_tokens=50, max_num_encoder_patches=1000)
    request = make_request(prompt(*range(7), video, *range(9)), 1)
    engine.scheduler.add_request(request)
    while engine.scheduler.has_unfinished_requests:
        engine.step()
        assert sum(engine.encoder_cache.num_references.values()) <= 1  # the one not whole yet
    assert not +engine.encoder_cache.num_references


def test_equal_frame_pairs_are_encoded_once() -> None:
    still, moving = Grid(6, 8, 8), (Grid(6, 8, 8), b"m" * 32)
    engine = FakeEngine(max_num_batched_tokens=1000)
    model_input = prompt(1, (still, b"s" * 32), 2, moving)
    item = replace(model_input.items[0], pair_digests=(b"s" * 32,) * 6)
    request = make_request(replace(model_input, items=(item, model_input.items[1])), 1)
    engine.scheduler.add_request(request)
    output = engine.step()
    assert [(one.item is item, one.index) for one in output.encoder_inputs] == [
        (True, 0),
        *((False, index) for index in range(6)),
    ]


def test_an_image_larger_than_the_budget_is_encoded_alone() -> None:
    large, small = (Grid(1, 20, 20), b"l" * 32), (Grid(1, 4, 4), b"s" * 32)
    engine = FakeEngine(max_num_batched_tokens=1000, max_num_encoder_patches=100)
    for image in (small, large):
        engine.scheduler.add_request(make_request(prompt(1, image, 2), 1))
    first, second = engine.step(), engine.step()
    assert [one.item.grid for one in first.encoder_inputs] == [small[0]]
    assert [one.item.grid for one in second.encoder_inputs] == [large[0]]


def test_one_image_in_two_requests_is_encoded_once() -> None:
    image = (Grid(1, 8, 8), b"p" * 32)
    engine = FakeEngine(max_num_batched_tokens=1000)
    for first in (1, 2):
        engine.scheduler.add_request(make_request(prompt(first, image, 3), 1))
    output = engine.step()
    assert len(output.token_chunks) == 2 and len(output.encoder_inputs) == 1


def test_a_prefix_being_computed_is_waited_for_and_copied() -> None:
    engine = FakeEngine(max_num_batched_tokens=1000)
    shared = list(range(3 * BLOCK_SIZE))
    both = [make_request(prompt(*shared, 7000 + i), 2) for i in range(2)]
    for request in both:
        engine.scheduler.add_request(request)
    first = engine.step()
    assert [c.request for c in first.token_chunks] == both[:1]
    second = engine.step()
    assert {id(c.request): len(c.input_ids) for c in second.token_chunks} == {
        id(both[0]): 1,
        id(both[1]): 1,
    }
    assert both[1].num_cached_tokens == 3 * BLOCK_SIZE


def test_the_last_admitted_request_is_preempted_and_resumes() -> None:
    engine = FakeEngine(blocks=8, max_num_batched_tokens=1000)
    first, last = (make_request(text(2 * BLOCK_SIZE, 1000 * i), 4 * BLOCK_SIZE) for i in range(2))
    for request in (first, last):
        engine.scheduler.add_request(request)
    was_preempted = False
    while engine.scheduler.has_unfinished_requests:
        engine.step()
        was_preempted |= (
            bool(last.output_token_ids) and last.allocation is None and not last.finish_reason
        )
    assert was_preempted
    letters = [ord("a") + n % 26 for n in range(2 * BLOCK_SIZE, 6 * BLOCK_SIZE)]
    assert first.output_token_ids == last.output_token_ids == letters


def test_a_failed_request_leaves_nothing_in_the_prefix_cache() -> None:
    engine = FakeEngine(max_num_batched_tokens=1000)
    bad, good = make_request(text(3 * BLOCK_SIZE), 3), make_request(text(3 * BLOCK_SIZE, 500), 3)
    for request in (bad, good):
        engine.scheduler.add_request(request)
    output = engine.scheduler.schedule()
    results = engine.run(output)
    results[0] = EngineError("broken")
    request_outputs = engine.scheduler.update_from_output(output, results)
    assert request_outputs[0].request is bad and bad.finish_reason == "error"
    assert engine.pool.match_prefix(bad.block_hashes.hashes) == 0
    engine.finish()
    assert good.finish_reason == "length"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    max_num_batched_tokens=st.integers(1, 80),
    max_num_seqs=st.integers(1, 4),
    blocks=st.integers(8, 20),
)
def test_all_requests_finish_with_any_limits(
    lengths: list[int], max_num_batched_tokens: int, max_num_seqs: int, blocks: int
) -> None:
    engine = FakeEngine(
        blocks=blocks,
        max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
        max_num_seqs=max_num_seqs,
    )
    rng = random.Random(0)
    requests = [make_request(text(n, rng.randrange(3) * 1000), rng.randint(1, 60)) for n in lengths]
    for request in requests:
        engine.scheduler.add_request(request)
    engine.finish()
    assert all(len(request.output_token_ids) == request.max_tokens for request in requests)
    assert engine.pool.num_used_blocks == 0


ERROR = EngineError("broken")


class SchedulerMachine(RuleBasedStateMachine):
    """Add, step, fail and abort in any order: blocks and references are conserved."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = FakeEngine(
            blocks=16, max_num_batched_tokens=60, max_num_encoder_patches=64, max_num_seqs=3
        )
        self.unfinished: list[Request] = []

    @rule(
        start=st.integers(0, 2),
        length=st.integers(1, 120),
        max_tokens=st.integers(1, 80),
        image=st.sampled_from([None, b"a", b"b"]),
        frames=st.integers(1, 3),
    )
    def add_request(
        self, start: int, length: int, max_tokens: int, image: bytes | None, frames: int
    ) -> None:
        items = [] if image is None else [(Grid(frames, 4, 8), image * 31 + bytes([frames]))]
        request = make_request(prompt(start, *items, *range(length)), max_tokens)
        self.unfinished.append(request)
        self.engine.scheduler.add_request(request)

    @precondition(lambda self: self.engine.scheduler.has_unfinished_requests)
    @rule(times=st.integers(1, 10))
    def step(self, times: int) -> None:
        for _ in range(times):
            if self.engine.scheduler.has_unfinished_requests:
                self.engine.step()
        self.unfinished = [request for request in self.unfinished if request.finish_reason is None]

    @precondition(lambda self: self.engine.scheduler.has_unfinished_requests)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        scheduler = self.engine.scheduler
        output = scheduler.schedule()
        # Out of memory: the step had no effect.
        if not output.token_chunks or data.draw(st.booleans()):
            scheduler.fail(
                data.draw(st.sampled_from([output.largest_request, *output.encoder_requests])),
                ERROR,
            )
        else:
            results = self.engine.run(output)
            results[data.draw(st.integers(0, len(results) - 1))] = ERROR
            scheduler.update_from_output(output, results)
        self.unfinished = [request for request in self.unfinished if request.finish_reason is None]

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = self.unfinished.pop(data.draw(st.integers(0, len(self.unfinished) - 1)))
        self.engine.scheduler.abort(request)

    @invariant()
    def blocks_belong_to_running_requests(self) -> None:
        running = self.engine.scheduler.running
        assert self.engine.pool.num_used_blocks == sum(
            request.allocation.num_blocks for request in running if request.allocation is not None
        )
        if not self.unfinished:
            assert not self.engine.scheduler.has_unfinished_requests
            assert not +self.engine.encoder_cache.num_references

    def teardown(self) -> None:
        self.engine.finish()
        assert self.engine.pool.num_used_blocks == 0
        assert not +self.engine.encoder_cache.num_references


SchedulerMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
