"""Rounding by examples changes outputs less than rounding to the nearest; by hand, it is GPTQ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qwen2vl.quantization.gptq as room
from qwen2vl.errors import CheckpointError
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.gptq import round_by_examples, round_by_squares
from qwen2vl.quantization.rtn import LEVELS, Groups, grid_of, round_groups
from qwen2vl.quantization.scheme import recipe
from tests.tiny import tiny_model


def inputs(seed: int, rows: int, width: int) -> Tensor:
    """Draw rows whose numbers go together, as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, width // 4, generator=generator)
    mixed = few @ torch.randn(width // 4, width, generator=generator)
    return mixed + 0.3 * torch.randn(rows, width, generator=generator)


def weights(seed: int, outputs: int, width: int) -> Tensor:
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def by_hand(weight_OI: Tensor, squares_II: Tensor, size: int) -> Groups:
    """Do GPTQ one column at a time on the inverse itself, in float64."""
    rest, width = weight_OI.double().clone(), weight_OI.shape[1]
    damping = 0.01 * float(squares_II.diagonal().mean())
    inverse = torch.linalg.inv(squares_II.double() + damping * torch.eye(width))
    ints, scales, zeros = torch.empty_like(weight_OI), [], []
    for i in range(width):
        if i % size == 0:
            scale, zero = grid_of(rest[:, i : i + size].float())
            scales.append(scale)
            zeros.append(zero)
        ints[:, i] = ((rest[:, i : i + 1] / scale).round() + zero).clamp(0, LEVELS)[:, 0]
        error = rest[:, i] - ((ints[:, i : i + 1] - zero) * scale)[:, 0]
        rest[:, i + 1 :] -= torch.outer(error / inverse[i, i], inverse[i, i + 1 :])
        # What is rounded can no longer make up for anything: take it out of the inverse.
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return Groups(
        ints_OI=ints.to(torch.uint8),
        scale_GO=torch.cat(scales, 1).T,
        zero_GO=torch.cat(zeros, 1).T.to(torch.uint8),
    )


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("columns", [64, 128])
def test_it_is_gptq(monkeypatch: pytest.MonkeyPatch, size: int, columns: int) -> None:
    monkeypatch.setattr(room, "COLUMNS", columns)
    weight_OI, x_TI = weights(0, 8, 192), inputs(1, 400, 192)
    got = round_by_squares(weight_OI, x_TI.T @ x_TI, size)
    want = by_hand(weight_OI, x_TI.T @ x_TI, size)
    assert got.group_size == size
    # Now and then a number lies so near the middle between two levels that float32 decides.
    assert float((got.ints_OI != want.ints_OI).float().mean()) < 0.02
    torch.testing.assert_close(got.scale_GO, want.scale_GO, rtol=0.02, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_outputs_change_less_than_by_the_nearest(seed: int) -> None:
    weight_OI, x_TI = weights(seed, 32, 128), inputs(seed + 10, 1000, 128)
    wanted_TO = x_TI @ weight_OI.T

    def lost(rounded: Groups) -> float:
        return float((x_TI @ rounded.dequantized().T - wanted_TO).square().mean())

    nearest = lost(round_groups(weight_OI, 32))
    assert lost(round_by_squares(weight_OI, x_TI.T @ x_TI, 32)) < 0.5 * nearest


def test_inputs_of_which_nothing_is_known_are_rounded_to_the_nearest() -> None:
    weight_OI = weights(0, 8, 64)
    got = round_by_squares(weight_OI, torch.zeros(64, 64), 32)
    want = round_groups(weight_OI, 32)
    assert torch.equal(got.ints_OI, want.ints_OI)
    assert torch.equal(got.zero_GO, want.zero_GO)


def test_fewer_examples_than_inputs_will_do() -> None:
    weight_OI, x_TI = weights(0, 8, 128), inputs(1, 5, 128)
    rounded = round_by_squares(weight_OI, x_TI.T @ x_TI, 64)
    wanted_TO = x_TI @ weight_OI.T
    got_TO = x_TI @ rounded.dequantized().T
    nearest_TO = x_TI @ round_groups(weight_OI, 64).dequantized().T
    assert float((got_TO - wanted_TO).norm()) < 0.5 * float((nearest_TO - wanted_TO).norm())


def test_inputs_that_are_no_numbers() -> None:
    with pytest.raises(CheckpointError, match="cannot be rounded by them: look for NaN"):
        round_by_squares(weights(0, 8, 64), torch.full((64, 64), float("nan")), 32)


def example(seed: int, tokens: int = 20) -> Callable[[Qwen2VL], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(0, 200, (tokens,), generator=generator)
    patches_NP = torch.randint(0, 256, (16, 1176), dtype=torch.uint8, generator=generator)

    def show(model: Qwen2VL) -> Tensor:
        return model(
            ids_T,
            torch.arange(tokens).expand(3, -1),
            AttnMeta.build([tokens]),
            patches_NP=patches_NP,
            vision_meta=VisionMeta.build([Grid(1, 4, 4)]),
            pad_index_M=torch.arange(4),
        )

    return show


def test_every_layer_is_rounded_by_what_it_was_shown() -> None:
    """Squares that the walk adds up are those of hooks on a plain run of the whole model."""
    model = tiny_model()
    kinds = {n: k for n, k in recipe(model, "int4").items() if k.bits == 4}
    shows = [example(seed) for seed in range(4)]
    want: dict[str, Tensor] = {}

    def listen(name: str) -> None:
        def take(_: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            want[name] = want.get(name, torch.zeros(())) + given[0].T @ given[0]

        model.get_submodule(name).register_forward_pre_hook(take)

    before = {name: p.clone() for name, p in model.named_parameters()}
    rounded = dict(round_by_examples(model, kinds, shows))
    for name in kinds:
        listen(name)
    with torch.inference_mode():
        for show in shows:
            show(model)
    assert list(rounded) == list(kinds)
    for name, groups in rounded.items():
        weight_OI = model.get_parameter(f"{name}.weight").detach()
        again = round_by_squares(weight_OI, want[name], kinds[name].group_size)
        assert float((groups.ints_OI != again.ints_OI).float().mean()) < 0.005
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.model.layers)
