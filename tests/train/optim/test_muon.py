"""Our Muon is torch's, to the bit; and a step that is skipped changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwen2vl.train.optim.muon import Muon, orthogonalize

SHAPES = [(8, 8), (6, 20), (20, 6), (1, 5)]


def matrices(seed: int) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def ours(parameters: list[nn.Parameter]) -> Muon:
    return Muon([{"params": parameters}], lr=0.02, momentum=0.95, weight_decay=0.1)


@pytest.mark.parametrize("skip", [None, 0.0])
def test_it_is_torch_s_to_the_bit(skip: float | None) -> None:
    own, reference = matrices(0), matrices(0)
    muon = ours(own)
    theirs = torch.optim.Muon(
        reference, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    muon.found_inf = None if skip is None else torch.tensor(skip)
    for seed in range(3):
        give_gradients(own, seed)
        give_gradients(reference, seed)
        muon.step()
        theirs.step()
    for a, b in zip(own, reference, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(muon.state[a]["momentum_buffer"], theirs.state[b]["momentum_buffer"])


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_a_skipped_step_changes_nothing_whatever_the_gradients_hold(value: float) -> None:
    own = matrices(0)
    muon = ours(own)
    give_gradients(own, 0)
    muon.step()
    before = [(p.detach().clone(), muon.state[p]["momentum_buffer"].clone()) for p in own]
    for parameter in own:
        parameter.grad = torch.full_like(parameter, value)
    muon.found_inf = torch.tensor(1.0)
    muon.step()
    for parameter, (weight, buffer) in zip(own, before, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(muon.state[parameter]["momentum_buffer"], buffer)


@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_singular_values_are_made_alike(shape: tuple[int, int]) -> None:
    matrix: Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    assert values.min() > 0.6
    assert values.max() < 1.3
