"""Rows gain what their owner's adapter adds, no more and no longer: equal to merged models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.linear.gemv import multiply_single_rows
from qwen2vl.lora.layers import LoraFactors, merge_lora
from qwen2vl.lora.multi import Adapter, AdapterSwitch, Owners
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.scheme import Mode, quantize
from tests.adapters import TEXT, VISION, random_factors
from tests.parity.oracle import random_model
from tests.tiny import tiny_config

MODEL = random_model(tiny_config(tie_word_embeddings=False))
FACTORS = [random_factors(MODEL, seed=1), random_factors(MODEL, ("q_proj", "fc1"), seed=2, rank=3)]
ADAPTERS = [Adapter.of(factors, MODEL) for factors in FACTORS]


def merged(factors: dict[str, LoraFactors] | None) -> Qwen2VL:
    model = copy.deepcopy(MODEL)
    merge_lora(model, factors or {})
    return model


MERGED = [merged(None), *map(merged, FACTORS)]


def owner(index: int) -> Adapter | None:
    return ADAPTERS[index - 1] if index else None


@torch.inference_mode()
def read(model: Qwen2VL, lengths: list[int], owners: Owners | None = None) -> Tensor:
    """Score the words after each token of some segments, (T, V)."""
    switch = AdapterSwitch(model)
    ids = torch.cat([torch.arange(length) + 7 for length in lengths])
    places = torch.cat([torch.arange(length) for length in lengths]).expand(3, -1)
    owners = owners or [(None, len(ids))]
    with switch.at_work("model", owners):
        hidden_TD = model(ids, places, AttnMeta.build(lengths))
    with switch.at_work("lm_head", owners):
        return model.logits(hidden_TD)


@torch.inference_mode()
def see(model: Qwen2VL, grids: list[Grid], owners: Owners | None = None) -> list[Tensor]:
    """Encode pictures that depend on their grids alone; rows of each."""
    patches = [torch.arange(g.h * g.w * 1176).view(-1, 1176) % 251 for g in grids]
    owners = owners or [(None, sum(map(len, patches)))]
    with AdapterSwitch(model).at_work("visual", owners):
        rows_MD = model.encode(torch.cat(patches).to(torch.uint8), VisionMeta.build(grids))
    return list(rows_MD.split([len(p) // 4 for p in patches]))


segments = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=1, max_size=6)


@given(segments)
@settings(max_examples=15)
def test_words_of_any_mix_are_those_of_merged_models(parts: list[tuple[int, int]]) -> None:
    lengths = [length for _, length in parts]
    got = read(MODEL, lengths, [(owner(index), length) for index, length in parts])
    for part, (index, length) in zip(got.split(lengths), parts, strict=True):
        torch.testing.assert_close(part, read(MERGED[index], [length]), rtol=1e-4, atol=1e-4)


@given(segments)
@settings(max_examples=15)
def test_pictures_of_any_mix_are_those_of_merged_models(parts: list[tuple[int, int]]) -> None:
    """The merger has four patches to a row."""
    grids = [Grid(1, 2, 2 * length) for _, length in parts]
    owners = [(owner(index), g.h * g.w) for (index, _), g in zip(parts, grids, strict=True)]
    for got, grid, (index, _) in zip(see(MODEL, grids, owners), grids, parts, strict=True):
        torch.testing.assert_close(got, see(MERGED[index], [grid])[0], rtol=1e-4, atol=1e-4)


def test_the_adapters_differ() -> None:
    """Else nothing would be shown."""
    plain, one, other = (read(model, [4]) for model in MERGED)
    assert (plain - one).abs().max() > 0.1 and (plain - other).abs().max() > 0.1
    assert (one - other).abs().max() > 0.1


def test_without_an_owner_the_very_modules_run_and_afterwards_again() -> None:
    model = copy.deepcopy(MODEL)
    switch = AdapterSwitch(model)
    before = dict(model.named_modules())
    layer = model.model.layers[0].self_attn
    for owners in ([], [(None, 3)], [(ADAPTERS[0], 0), (None, 3)]):
        with switch.at_work("model", owners):
            assert dict(model.named_modules()) == before
    with switch.at_work("model", [(ADAPTERS[0], 3)]):
        assert layer.q_proj is not before["model.layers.0.self_attn.q_proj"]
        assert model.visual.blocks[0].attn.qkv is before["visual.blocks.0.attn.qkv"]
    assert dict(model.named_modules()) == before
    with pytest.raises(ZeroDivisionError), switch.at_work("model", [(ADAPTERS[0], 3)]):
        _ = 1 / 0
    assert dict(model.named_modules()) == before


def test_an_interrupt_while_places_are_given_back_is_mended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = copy.deepcopy(MODEL)
    switch, before = AdapterSwitch(model), dict(model.named_modules())
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
        switch.at_work("model", [(ADAPTERS[0], 3)]),
    ):
        patch.setattr(switch, "_take_back", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert model.model.layers[0].mlp.up_proj is not before["model.layers.0.mlp.up_proj"]
    with switch.at_work("model", [(None, 3)]):
        assert dict(model.named_modules()) == before


class Naive(nn.Module):
    """The written formula, for all rows."""

    def __init__(self, layer: nn.Module, factors: LoraFactors) -> None:
        super().__init__()
        self.layer, self.factors = layer, factors

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.factors.a_RX.to(x.dtype), self.factors.b_YR.to(x.dtype)
        return self.layer(x) + self.factors.scale * (x @ a.T @ b.T)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_small_integers_and_joined_layers_lie_beneath(mode: Mode) -> None:
    model, reference = copy.deepcopy(MODEL), copy.deepcopy(MODEL)
    factors = random_factors(MODEL, seed=3)
    for each in (model, reference):
        quantize(each, mode)
    for name, found in factors.items():
        reference.set_submodule(name, Naive(reference.get_submodule(name), found))
    adapter = Adapter.of(factors, model)
    for length in (1, 12):
        want = read(reference, [length])
        got = read(model, [length, 12], [(adapter, length), (None, 12)])[:length]
        # Rows in the company of others may be rounded to other integers.
        tolerance = 1e-4 if length == 12 else 0.05
        assert (got - want).norm() < tolerance * want.norm()
        assert (read(model, [length]) - want).norm() > 0.3 * want.norm()
    pictures = [Grid(1, 4, 4), Grid(1, 2, 6)]
    both = see(model, pictures, [(None, 16), (adapter, 12)])
    torch.testing.assert_close(both[1], see(reference, pictures)[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both[0], see(model, pictures)[0])


def test_half_precision_and_single_rows() -> None:
    model, want = copy.deepcopy(MODEL).bfloat16(), merged(FACTORS[0])
    multiply_single_rows(model)
    adapter = Adapter.of(FACTORS[0], model)
    got = read(model, [1], [(adapter, 1)]).float()
    assert (got - read(want, [1])).norm() < 0.03 * got.norm()


@pytest.mark.parametrize("change", [{"seed": 5}, {"rank": 3}, {"targets": ("q_proj",)}])
def test_digests_name_what_an_adapter_adds(change: dict[str, Any]) -> None:
    def made(**options: Any) -> Adapter:
        return Adapter.of(random_factors(MODEL, **options), MODEL)

    assert made().digest == made().digest
    assert made().vision_digest == made().vision_digest != b""
    assert made(**change).digest != made().digest
    assert made(targets=TEXT).vision_digest == b""
    assert made(targets=VISION).digest == made(targets=VISION).vision_digest
    louder = {
        name: LoraFactors(a_RX=f.a_RX, b_YR=f.b_YR, scale=2 * f.scale)
        for name, f in random_factors(MODEL).items()
    }
    assert Adapter.of(louder, MODEL).digest != made().digest
