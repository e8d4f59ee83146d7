"""EngineCore and its owner as a state machine: interrupts, out of memory, failed requests, aborts.

Whatever happens in between, a request that finishes has the output that it has alone in a new
engine, and memory is accounted for after every transition.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.engine_core import EngineCore
from qwen2vl.engine.request import Request
from qwen2vl.errors import EngineError
from qwen2vl.processor.inputs import ModelInput
from tests.engine.test_runner import (
    CONVERSATIONS,
    GREEDY,
    assert_same_completion,
    new_llm,
    reference_completion,
)

PARTS = ("_encode", "_forward", "apply_cache_operations", "apply_free_operations")


@cache
def prompts() -> list[ModelInput]:
    """Prepare the conversations once."""
    return [new_llm().processor(conversation) for conversation in CONVERSATIONS]


class EngineMachine(RuleBasedStateMachine):
    """Requests come and go while steps succeed, fail and are interrupted."""

    num_out_of_memory = 0  # injected in all runs of the machine

    def __init__(self) -> None:
        super().__init__()
        self.llm: LLM = new_llm(
            kv_cache_tokens=480,
            max_num_batched_tokens=64,
            max_num_encoder_patches=32,
            max_num_seqs=3,
            num_speculative_tokens=2,
        )
        self.unfinished: dict[Request, int] = {}  # request -> index of its conversation

    @rule(index=st.integers(0, len(CONVERSATIONS) - 1))
    def add_request(self, index: int) -> None:
        (request,) = self.llm.create_requests(prompts()[index], GREEDY)
        self.llm.add_request(request)
        self.unfinished[request] = index

    @precondition(lambda self: self.unfinished)
    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._collect(self.llm.step())

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.unfinished)))
        self.llm.abort(request)
        del self.unfinished[request]

    @precondition(lambda self: self.unfinished)
    @rule(part=st.sampled_from(PARTS), error=st.sampled_from([KeyboardInterrupt, RuntimeError]))
    def interrupt(self, part: str, error: type[BaseException]) -> None:
        """An interrupt or a bug inside a step: all requests are gone, and a new core starts."""
        core = self.llm.engine_core
        with _raising_once(core.runner, part, error) as is_raised, suppress(error):
            while self.unfinished:
                self._collect(self.llm.step())
        if is_raised():
            assert self.llm.engine_core is not core
            self.unfinished.clear()

    @precondition(lambda self: self.unfinished)
    @rule(part=st.sampled_from(("_encode", "_forward")))
    def run_out_of_memory(self, part: str) -> None:
        """Cached blocks are evicted and the step runs again, or one request fails."""
        core = self.llm.engine_core
        with _raising_once(core.runner, part, MemoryError) as is_raised:
            self._collect(self.llm.step())
        EngineMachine.num_out_of_memory += is_raised()
        assert self.llm.engine_core is core

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def fail_request(self, data: st.DataObject) -> None:
        """A request whose sampling fails ends alone."""
        request = data.draw(st.sampled_from(list(self.unfinished)))

        def fail(_: object) -> Any:
            raise EngineError("sampling failed")

        request.sampler.sample = fail  # type: ignore[method-assign]
        while request in self.unfinished:
            self._collect(self.llm.step())
        assert request.finish_reason == "error"

    def _collect(self, outputs: Any) -> None:
        for output in outputs:
            request = output.request
            if request.finish_reason is None:
                continue
            index = self.unfinished.pop(request)
            if request.finish_reason != "error":
                assert_same_completion(request.completion(), reference_completion(index))

    @invariant()
    def memory_is_accounted_for(self) -> None:
        core = self.llm.engine_core
        scheduler, pool = core.scheduler, core.scheduler.pool
        assert {*scheduler.running, *scheduler.waiting} == set(self.unfinished)
        allocations = [r.allocation for r in scheduler.running if r.allocation is not None]
        assert pool.num_used_blocks == sum(a.num_blocks for a in allocations)
        if not self.unfinished:
            assert not core.encoder_cache._num_references
            assert set(core.runner.caches) <= set(pool._evictable)

    def teardown(self) -> None:
        while self.unfinished:
            self._collect(self.llm.step())
        self.memory_is_accounted_for()


class _raising_once:  # noqa: N801
    """Replace a method of an object by one that raises at its first call."""

    def __init__(self, owner: object, name: str, error: type[BaseException]) -> None:
        self._owner, self._name, self._error = owner, name, error
        self._is_raised = False

    def __enter__(self) -> Callable[[], bool]:
        def fail(*_: object) -> None:
            delattr(self._owner, self._name)
            self._is_raised = True
            raise self._error

        setattr(self._owner, self._name, fail)
        return lambda: self._is_raised

    def __exit__(self, *_: object) -> None:
        if not self._is_raised:
            delattr(self._owner, self._name)


def test_outputs_and_memory_are_right_after_any_transitions() -> None:
    EngineMachine.num_out_of_memory = 0
    run_state_machine_as_test(
        EngineMachine, settings=settings(max_examples=25, stateful_step_count=15, deadline=None)
    )
    assert EngineMachine.num_out_of_memory > 0


def test_an_engine_core_is_created_when_first_used() -> None:
    llm = new_llm()
    assert llm.engine.current_core is None and not llm.has_unfinished_requests
    assert isinstance(llm.engine_core, EngineCore) and llm.engine_core is llm.engine_core


def test_a_new_core_uses_the_same_storage_and_decode_backend() -> None:
    llm = new_llm()
    first = llm.engine_core
    with _raising_once(first.runner, "_forward", RuntimeError), pytest.raises(RuntimeError):
        llm.chat(CONVERSATIONS[0], SamplingParams(temperature=0, max_tokens=2))
    assert llm.engine_core.runner.kv_storage is first.runner.kv_storage
    assert llm.engine_core.runner.decode_backend is first.runner.decode_backend
