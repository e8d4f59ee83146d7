"""What runs when, by counting alone: no model, a shelf that encodes at once."""

from __future__ import annotations

import random
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen2vl.engine.kv_cache.block_pool import BLOCK, BlockPool, Copy, Free, Reserve
from qwen2vl.engine.request import Sequence
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.sampling.sampler import Rule, Sampler
from qwen2vl.engine.scheduler.output import Limits, Plan, Sampled
from qwen2vl.engine.scheduler.scheduler import Scheduler
from qwen2vl.errors import EngineError
from qwen2vl.geometry import Grid
from qwen2vl.processor.inputs import Item, ModelInput
from qwen2vl.processor.tokenizer import TextStream
from qwen2vl.weights import GenerationDefaults
from tests.engine.kv_cache.test_block_pool import prompt
from tests.tiny import tiny_tokenizer

RULE = Rule.resolve(SamplingParams(temperature=0), GenerationDefaults())


def sequence(made: ModelInput, max_tokens: int = 4) -> Sequence:
    return Sequence(
        made,
        SamplingParams(max_tokens=max_tokens),
        TextStream(tiny_tokenizer()),
        Sampler(RULE, [], vocab_size=300, device=torch.device("cpu")),
        end_ids=frozenset(),
        max_model_len=10_000,
    )


class FakeShelf:
    """Counts holds; frame pairs are ready when they were planned."""

    def __init__(self) -> None:
        self.holds: Counter[bytes] = Counter()
        self.slices: dict[bytes, int] = {}

    def hold(self, item: Item) -> None:
        self.holds[item.digest] += 1

    def release(self, item: Item) -> None:
        self.holds[item.digest] -= 1
        assert self.holds[item.digest] >= 0
        if not self.holds[item.digest]:
            self.slices.pop(item.digest, None)

    def ready(self, item: Item) -> int:
        return self.slices.get(item.digest, 0)


class Machine:
    """Runs plans: carries out orders, checks every chunk, and answers each with letters."""

    def __init__(self, blocks: int = 64, **limits: int) -> None:
        self.shelf = FakeShelf()
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, self.shelf, Limits(**limits))
        self.memory: dict[int, list[int]] = {}  # row -> the ids whose keys and values it holds
        self.room: dict[int, int] = {}

    def step(self) -> Plan:
        plan = self.scheduler.plan()
        self.scheduler.commit(plan, self.run(plan))
        return plan

    def run(self, plan: Plan) -> list[Sampled | EngineError]:
        while plan.orders:
            match plan.orders.popleft():
                case Reserve(row, tokens):
                    self.memory.setdefault(row, [])
                    self.room[row] = tokens
                case Copy(source, target, tokens):
                    self.memory[target] = self.memory[source][:tokens]
                case Free(row):
                    del self.memory[row], self.room[row]
        for slices in plan.slices:
            assert self.shelf.ready(slices.item) == slices.start
            self.shelf.slices[slices.item.digest] = slices.stop
        results: list[Sampled | EngineError] = []
        for chunk in plan.chunks:
            one = chunk.sequence
            assert one.row is not None
            held = self.memory[one.row.number]
            assert held[: chunk.start] == one.ids[: chunk.start], "what is stored is another's"
            for start, item in one.items_after(chunk.start):
                if start < chunk.stop:
                    seen = start + item.num_tokens * self.shelf.ready(item) // item.grid.t
                    assert min(start + item.num_tokens, chunk.stop) <= seen
            held[chunk.start :] = chunk.ids
            assert len(held) <= self.room[one.row.number]
            sampled = [(ord("a") + len(one.ids) % 26, None)]
            results.append(sampled if chunk.num_sampled else [])
        return results

    def finish(self) -> int:
        steps = 0
        while self.scheduler.has_work:
            self.step()
            steps += 1
        return steps


def text(length: int, first: int = 0) -> ModelInput:
    return prompt(*range(first, first + length))


def test_a_long_prompt_goes_in_chunks_and_answers_go_on_meanwhile() -> None:
    machine = Machine(tokens=50)
    short, long = sequence(text(10), 6), sequence(text(140, 1000), 2)
    machine.scheduler.add(short)
    machine.step()
    machine.scheduler.add(long)
    shares = []
    while long.finish_reason is None:
        plan = machine.step()
        shares.append({id(c.sequence): len(c.ids) for c in plan.chunks})
    assert [share.get(id(long)) for share in shares] == [49, 49, 42, 1]
    assert all(share[id(short)] == 1 for share in shares[:3])


def test_first_come_first_served() -> None:
    machine = Machine(tokens=1000, sequences=2)
    many = [sequence(text(20, 100 * i), 3) for i in range(5)]
    for one in many:
        machine.scheduler.add(one)
    order: list[int] = []
    while machine.scheduler.has_work:
        machine.step()
        order += [i for i, one in enumerate(many) if one.finish_reason and i not in order]
    assert order == [0, 1, 2, 3, 4]


def test_a_chunk_ends_where_rows_are_missing() -> None:
    """A clip of 5 frame pairs of 64 patches, 16 tokens each; two fit into the budget of a step."""
    clip = (Grid(5, 8, 8), b"c" * 32)
    machine = Machine(tokens=1000, patches=128)
    one = sequence(prompt(*range(7), clip, *range(9)), 1)
    machine.scheduler.add(one)
    stops = []
    while machine.scheduler.has_work:
        plan = machine.step()
        stops.append([(s.start, s.stop) for s in plan.slices] + [c.stop for c in plan.chunks])
    assert stops == [[(0, 2), 7 + 32], [(2, 4), 7 + 64], [(4, 5), 7 + 80 + 9]]
    assert not +machine.shelf.holds


def test_a_picture_larger_than_the_budget_goes_alone() -> None:
    large, small = (Grid(1, 20, 20), b"l" * 32), (Grid(1, 4, 4), b"s" * 32)
    machine = Machine(tokens=1000, patches=100)
    for picture in (small, large):
        machine.scheduler.add(sequence(prompt(1, picture, 2), 1))
    first, second = machine.step(), machine.step()
    assert [s.item.grid for s in first.slices] == [small[0]]
    assert [s.item.grid for s in second.slices] == [large[0]]


def test_one_picture_in_two_requests_is_encoded_once() -> None:
    picture = (Grid(1, 8, 8), b"p" * 32)
    machine = Machine(tokens=1000)
    for first in (1, 2):
        machine.scheduler.add(sequence(prompt(first, picture, 3), 1))
    plan = machine.step()
    assert len(plan.chunks) == 2 and len(plan.slices) == 1


def test_a_prompt_that_another_computes_now_waits_and_copies() -> None:
    machine = Machine(tokens=1000)
    shared = list(range(3 * BLOCK))
    both = [sequence(prompt(*shared, 7000 + i), 2) for i in range(2)]
    for one in both:
        machine.scheduler.add(one)
    first = machine.step()
    assert [c.sequence for c in first.chunks] == both[:1]
    second = machine.step()
    assert {id(c.sequence): len(c.ids) for c in second.chunks} == {
        id(both[0]): 1,
        id(both[1]): 1,
    }
    assert both[1].num_cached == 3 * BLOCK


def test_the_youngest_gives_way_and_comes_back() -> None:
    machine = Machine(blocks=8, tokens=1000)
    old, young = (sequence(text(2 * BLOCK, 1000 * i), 4 * BLOCK) for i in range(2))
    for one in (old, young):
        machine.scheduler.add(one)
    gave_way = False
    while machine.scheduler.has_work:
        machine.step()
        gave_way |= bool(young.token_ids) and young.row is None and not young.finish_reason
    assert gave_way
    letters = [ord("a") + n % 26 for n in range(2 * BLOCK, 6 * BLOCK)]
    assert old.token_ids == young.token_ids == letters


def test_a_failure_ends_one_and_its_row_is_not_found_again() -> None:
    machine = Machine(tokens=1000)
    bad, good = sequence(text(3 * BLOCK), 3), sequence(text(3 * BLOCK, 500), 3)
    for one in (bad, good):
        machine.scheduler.add(one)
    plan = machine.scheduler.plan()
    results = machine.run(plan)
    results[0] = EngineError("broken")
    news = machine.scheduler.commit(plan, results)
    assert news[0].sequence is bad and bad.finish_reason == "error"
    assert machine.pool.match(bad.chain.keys) == 0
    machine.finish()
    assert good.finish_reason == "length"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    tokens=st.integers(1, 80),
    sequences=st.integers(1, 4),
    blocks=st.integers(8, 20),
)
def test_everything_ends_whatever_the_budgets(
    lengths: list[int], tokens: int, sequences: int, blocks: int
) -> None:
    machine = Machine(blocks=blocks, tokens=max(tokens, sequences), sequences=sequences)
    rng = random.Random(0)
    many = [sequence(text(n, rng.randrange(3) * 1000), rng.randint(1, 60)) for n in lengths]
    for one in many:
        machine.scheduler.add(one)
    machine.finish()
    assert all(len(one.token_ids) == one.max_tokens for one in many)
    assert machine.pool.num_busy == 0


BROKEN = EngineError("broken")


class Life(RuleBasedStateMachine):
    """Admit, step, fail and cancel in any order: blocks and holds are conserved."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(blocks=16, tokens=60, patches=64, sequences=3)
        self.alive: list[Sequence] = []

    @rule(
        start=st.integers(0, 2),
        length=st.integers(1, 120),
        answer=st.integers(1, 80),
        picture=st.sampled_from([None, b"a", b"b"]),
        frames=st.integers(1, 3),
    )
    def admit(
        self, start: int, length: int, answer: int, picture: bytes | None, frames: int
    ) -> None:
        seen = [] if picture is None else [(Grid(frames, 4, 8), picture * 31 + bytes([frames]))]
        one = sequence(prompt(start, *seen, *range(length)), answer)
        self.alive.append(one)
        self.machine.scheduler.add(one)

    @precondition(lambda self: self.machine.scheduler.has_work)
    @rule(times=st.integers(1, 10))
    def step(self, times: int) -> None:
        for _ in range(times):
            if self.machine.scheduler.has_work:
                self.machine.step()
        self.alive = [one for one in self.alive if one.finish_reason is None]

    @precondition(lambda self: self.machine.scheduler.has_work)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        scheduler = self.machine.scheduler
        plan = scheduler.plan()
        if not plan.chunks or data.draw(st.booleans()):  # memory ran out: nothing of it happened
            scheduler.fail(data.draw(st.sampled_from([plan.largest, *plan.viewers])), BROKEN)
        else:
            results = self.machine.run(plan)
            results[data.draw(st.integers(0, len(results) - 1))] = BROKEN
            scheduler.commit(plan, results)
        self.alive = [one for one in self.alive if one.finish_reason is None]

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1)))
        self.machine.scheduler.cancel(one)

    @invariant()
    def blocks_belong_to_the_living(self) -> None:
        running = self.machine.scheduler.running
        assert self.machine.pool.num_busy == sum(
            one.row.num_blocks for one in running if one.row is not None
        )
        if not self.alive:
            assert not self.machine.scheduler.has_work
            assert not +self.machine.shelf.holds

    def teardown(self) -> None:
        self.machine.finish()
        assert self.machine.pool.num_busy == 0
        assert not +self.machine.shelf.holds


Life.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestLife = Life.TestCase
