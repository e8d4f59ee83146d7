"""Spikes move nothing, levels that stay are accepted, and what is not finite ends the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl.errors import EngineError
from qwen2vl.train.optim.spike_guard import WINDOW, Guard


def judged(guard: Guard, losses: list[float], norms: list[float] | None = None) -> list[bool]:
    start = guard.seen
    pairs = zip(losses, norms or [1.0 + (i % 3) / 10 for i in range(len(losses))], strict=True)
    return [
        bool(guard.judge(start + i, torch.tensor(loss), torch.tensor(norm)))
        for i, (loss, norm) in enumerate(pairs, 1)
    ]


def calm(count: int) -> list[float]:
    return [2.0 + (i % 5) / 10 for i in range(count)]


def test_a_spike_is_skipped_and_calm_steps_are_not() -> None:
    guard = Guard(6.0, "cpu")
    assert judged(guard, [*calm(100), 9.0, *calm(20)]) == [False] * 100 + [True] + [False] * 20
    assert guard.take_skipped() == 1
    assert guard.take_skipped() == 0


def test_a_norm_can_be_the_spike() -> None:
    guard = Guard(6.0, "cpu")
    judged(guard, calm(100))
    assert judged(guard, [2.0], [50.0]) == [True]


def test_what_falls_is_no_spike() -> None:
    guard = Guard(6.0, "cpu")
    judged(guard, calm(100))
    assert judged(guard, [0.01], [0.01]) == [False]


def test_a_new_level_is_accepted_after_a_few_steps() -> None:
    guard = Guard(6.0, "cpu")
    judged(guard, calm(WINDOW))
    skipped = judged(guard, [6.0] * 20)
    assert skipped[0] and not any(skipped[6:])


@pytest.mark.parametrize("sigmas", [0.0, 6.0])
def test_it_takes_half_a_window_to_know_what_is_usual(sigmas: float) -> None:
    guard = Guard(sigmas, "cpu")
    judged(guard, calm(WINDOW // 2 - 1))
    assert judged(guard, [100.0]) == [False]
    if not sigmas:
        assert judged(guard, [*calm(WINDOW), 100.0])[-1] is False  # switched off


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_what_is_not_finite_stops_every_later_step_and_is_told(loss: float, norm: float) -> None:
    guard = Guard(0.0, "cpu")
    assert judged(guard, [2.0, loss, 2.0, 2.0], [1.0, norm, 1.0, 1.0]) == [False, True, True, True]
    with pytest.raises(EngineError, match=rf"step 2: loss {loss}, gradient norm {norm}; .*out=F"):
        guard.check()


def test_a_healthy_run_passes_the_check() -> None:
    guard = Guard(6.0, "cpu")
    judged(guard, calm(10))
    guard.check()


def test_judging_never_waits_for_the_device() -> None:
    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "the host waited"
            return func(*args, **(kwargs or {}))

    guard = Guard(6.0, "cpu")
    pair = torch.tensor(2.0), torch.tensor(1.0)
    with NoReading():
        for step in range(1, WINDOW + 2):
            guard.judge(step, *pair)


def test_a_guard_that_comes_back_judges_as_it_would_have() -> None:
    one, two = Guard(6.0, "cpu"), Guard(6.0, "cpu")
    judged(one, calm(100))
    two.load_state({name: tensor.clone() for name, tensor in one.state().items()})
    following = [2.1, 9.0, *calm(60), 9.0]
    assert judged(one, following) == judged(two, following)
    assert torch.equal(one.history_2W, two.history_2W)
