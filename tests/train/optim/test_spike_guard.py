"""Spike guard: spikes are skipped, new levels accepted, and a non-finite step ends the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl.errors import EngineError
from qwen2vl.train.optim.spike_guard import WINDOW, SpikeGuard


def skipped_steps(
    guard: SpikeGuard, losses: list[float], norms: list[float] | None = None
) -> list[bool]:
    start = guard.num_seen
    pairs = zip(losses, norms or [1.0 + (i % 3) / 10 for i in range(len(losses))], strict=True)
    return [
        bool(guard.should_skip(start + i, torch.tensor(loss), torch.tensor(norm)))
        for i, (loss, norm) in enumerate(pairs, 1)
    ]


def normal_losses(count: int) -> list[float]:
    return [2.0 + (i % 5) / 10 for i in range(count)]


def test_a_spike_is_skipped_and_normal_steps_are_not() -> None:
    guard = SpikeGuard(6.0, "cpu")
    assert (
        skipped_steps(guard, [*normal_losses(100), 9.0, *normal_losses(20)])
        == [False] * 100 + [True] + [False] * 20
    )
    assert guard.pop_num_skipped() == 1
    assert guard.pop_num_skipped() == 0


def test_a_spike_of_the_norm_is_skipped() -> None:
    guard = SpikeGuard(6.0, "cpu")
    skipped_steps(guard, normal_losses(100))
    assert skipped_steps(guard, [2.0], [50.0]) == [True]


def test_a_drop_is_not_a_spike() -> None:
    guard = SpikeGuard(6.0, "cpu")
    skipped_steps(guard, normal_losses(100))
    assert skipped_steps(guard, [0.01], [0.01]) == [False]


def test_a_new_level_is_accepted_after_a_few_steps() -> None:
    guard = SpikeGuard(6.0, "cpu")
    skipped_steps(guard, normal_losses(WINDOW))
    was_skipped = skipped_steps(guard, [6.0] * 20)
    assert was_skipped[0] and not any(was_skipped[6:])


@pytest.mark.parametrize("sigmas", [0.0, 6.0])
def test_no_step_is_skipped_in_the_first_half_window(sigmas: float) -> None:
    guard = SpikeGuard(sigmas, "cpu")
    skipped_steps(guard, normal_losses(WINDOW // 2 - 1))
    assert skipped_steps(guard, [100.0]) == [False]
    if not sigmas:
        assert skipped_steps(guard, [*normal_losses(WINDOW), 100.0])[-1] is False  # disabled


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_after_a_non_finite_step_all_are_skipped_and_an_error_is_raised(
    loss: float, norm: float
) -> None:
    guard = SpikeGuard(0.0, "cpu")
    assert skipped_steps(guard, [2.0, loss, 2.0, 2.0], [1.0, norm, 1.0, 1.0]) == [
        False,
        True,
        True,
        True,
    ]
    with pytest.raises(
        EngineError, match=rf"step 2: loss {loss}, gradient norm {norm}; .*output_dir=F"
    ):
        guard.raise_if_not_finite()


def test_finite_steps_raise_no_error() -> None:
    guard = SpikeGuard(6.0, "cpu")
    skipped_steps(guard, normal_losses(10))
    guard.raise_if_not_finite()


def test_should_skip_does_not_sync_with_the_device() -> None:
    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "the host waited"
            return func(*args, **(kwargs or {}))

    guard = SpikeGuard(6.0, "cpu")
    pair = torch.tensor(2.0), torch.tensor(1.0)
    with NoReading():
        for step in range(1, WINDOW + 2):
            guard.should_skip(step, *pair)


def test_a_restored_guard_makes_the_same_decisions() -> None:
    one, two = SpikeGuard(6.0, "cpu"), SpikeGuard(6.0, "cpu")
    skipped_steps(one, normal_losses(100))
    two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    following = [2.1, 9.0, *normal_losses(60), 9.0]
    assert skipped_steps(one, following) == skipped_steps(two, following)
    assert torch.equal(one.history_2W, two.history_2W)
