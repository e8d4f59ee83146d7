"""Muon: equal to torch.optim.Muon bit for bit in bfloat16; a skipped step changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwen2vl import memory
from qwen2vl.train.optim.muon import Muon, orthogonalize

SHAPES = [(8, 8), (6, 20), (20, 6), (1, 5)]


def random_matrices(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_random_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def create_muon(parameters: list[nn.Parameter]) -> Muon:
    return Muon([{"params": parameters}], lr=0.02, momentum=0.95, weight_decay=0.1)


@pytest.mark.parametrize("skip", [None, 0.0])
@pytest.mark.parametrize("native", [True, False])
def test_muon_equals_torch_s(
    monkeypatch: pytest.MonkeyPatch, skip: float | None, native: bool
) -> None:
    """Bit for bit in bfloat16; in float32, as on processors without it, within its rounding."""
    monkeypatch.setattr(memory, "_has_native_bf16", lambda: native)
    ours, reference = random_matrices(0), random_matrices(0)
    muon = create_muon(ours)
    torch_muon = torch.optim.Muon(
        reference, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    muon.found_inf = None if skip is None else torch.tensor(skip)
    for seed in range(3):
        set_random_gradients(ours, seed)
        set_random_gradients(reference, seed)
        muon.step()
        torch_muon.step()
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a, b) if native else torch.allclose(a, b, atol=1e-3)
        assert torch.equal(muon.state[a]["momentum_buffer"], torch_muon.state[b]["momentum_buffer"])


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_a_skipped_step_changes_nothing_for_any_gradients(value: float) -> None:
    ours = random_matrices(0)
    muon = create_muon(ours)
    set_random_gradients(ours, 0)
    muon.step()
    before = [(p.detach().clone(), muon.state[p]["momentum_buffer"].clone()) for p in ours]
    for parameter in ours:
        parameter.grad = torch.full_like(parameter, value)
    muon.found_inf = torch.tensor(1.0)
    muon.step()
    for parameter, (weight, buffer) in zip(ours, before, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(muon.state[parameter]["momentum_buffer"], buffer)


@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_orthogonalize_gives_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix: Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    assert values.min() > 0.6
    assert values.max() < 1.3
