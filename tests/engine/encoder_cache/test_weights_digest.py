"""Weights that differ in anything have another name; the same weights have the same one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qwen2vl.engine.encoder_cache.weights_digest import VisionWeights, hash_tower
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.scheme import Mode, quantize
from tests.tiny import tiny_model


def watch(model: Qwen2VL, *, lasting: bool = True, description: str = "") -> VisionWeights:
    return VisionWeights(model, lasting=lasting, description=description)


def test_same_weights_same_name() -> None:
    names = {watch(tiny_model()).fingerprint() for _ in range(2)}
    assert len(names) == 1
    assert {len(name) for name in names} == {32}


def test_the_name_holds_in_another_process() -> None:
    code = (
        "from qwen2vl.engine.encoder_cache.weights_digest import hash_tower; from tests.tiny import tiny_model; "
        "print(hash_tower(tiny_model().visual).hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hash_tower(tiny_model().visual).hex()


def test_without_lasting_nothing_is_hashed_and_names_are_never_shared() -> None:
    model = tiny_model()
    one, two = watch(model, lasting=False), watch(model, lasting=False)
    assert one.fingerprint() == one.fingerprint() != two.fingerprint()
    assert len(one.fingerprint()) == 32


def _one_number(model: Qwen2VL) -> None:
    with torch.no_grad():
        model.visual.blocks[1].mlp.fc2.weight[-1, -1] += 1e-7


def _optimizer(model: Qwen2VL) -> None:
    model.visual.merger.mlp[2].weight.grad = torch.ones_like(model.visual.merger.mlp[2].weight)
    torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True).step()


def _other_weights(model: Qwen2VL) -> None:
    model.load_state_dict(tiny_model(seed=1).state_dict())


def _assigned_weights(model: Qwen2VL) -> None:
    model.load_state_dict(tiny_model(seed=1).state_dict(), assign=True)


def _precision(model: Qwen2VL) -> None:
    model.bfloat16()


def _data(model: Qwen2VL) -> None:
    weight = model.visual.blocks[0].attn.qkv.weight
    weight.data = weight.data * 2


def _new_module(model: Qwen2VL) -> None:
    class Halved(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) / 2

    old = model.visual.blocks[0].mlp.fc1
    new = Halved(old.in_features, old.out_features)
    new.weight, new.bias = old.weight, old.bias
    model.visual.blocks[0].mlp.fc1 = new
    model.visual.register_buffer("scale", torch.ones(1))


CHANGES = [
    _one_number,
    _optimizer,
    _other_weights,
    _assigned_weights,
    _precision,
    _data,
    _new_module,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("lasting", [True, False])
def test_every_change_is_noticed(change: Callable[[Qwen2VL], None], lasting: bool) -> None:
    model = tiny_model()
    weights = watch(model, lasting=lasting)
    before = weights.fingerprint()
    assert weights.fingerprint() == before
    change(model)
    assert weights.fingerprint() != before
    assert weights.fingerprint() == weights.fingerprint()


@pytest.mark.parametrize("change", CHANGES)
def test_the_content_decides_not_the_history(change: Callable[[Qwen2VL], None]) -> None:
    """Two models that went the same way have one name, though their tensors are not the same."""
    one, two = tiny_model(), tiny_model()
    weights = watch(two)
    weights.fingerprint()
    change(one)
    change(two)
    assert watch(one).fingerprint() == weights.fingerprint() != watch(tiny_model()).fingerprint()


def test_weights_that_return_get_their_name_back() -> None:
    model = tiny_model()
    weights = watch(model)
    before = weights.fingerprint()
    _one_number(model)
    weights.fingerprint()
    model.load_state_dict(tiny_model().state_dict())
    assert weights.fingerprint() == before


def test_the_decoder_does_not_matter() -> None:
    model = tiny_model()
    weights = watch(model)
    before = weights.fingerprint()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert weights.fingerprint() == before


def test_the_description_counts() -> None:
    model = tiny_model()
    names = {watch(model, description=text).fingerprint() for text in ("", "int8, rows", "int4")}
    assert len(names) == 3


def test_numbers_that_are_no_tensors_count() -> None:
    from dataclasses import replace

    model, other = tiny_model(), tiny_model()
    config = other.config.vision
    other.visual.config = replace(config, num_heads=4)
    assert hash_tower(other.visual) != hash_tower(model.visual)


def test_frozen_and_packed_weights_have_names() -> None:
    with torch.inference_mode():
        born_here = tiny_model()
    assert watch(born_here).fingerprint() == watch(tiny_model()).fingerprint()
    packed = tiny_model()
    packed.visual.register_buffer("packed", torch.ones(4, 4).to_mkldnn())
    names = [watch(packed).fingerprint()]
    packed.visual.packed = torch.full((4, 4), 2.0).to_mkldnn()
    names.append(watch(packed).fingerprint())
    assert names[0] != names[1]


def test_start_works_in_the_background() -> None:
    weights = watch(tiny_model())
    pending = weights.start()
    assert weights.start() is pending
    assert pending.result() == weights.fingerprint()


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_towers_have_names_of_their_own(mode: Mode) -> None:
    """Packed weights count by their content, not only by their class."""

    def name(sign: int = 1, *, quantized: bool = True) -> bytes:
        model = tiny_model().to(torch.bfloat16)
        with torch.no_grad():
            model.visual.blocks[0].mlp.fc1.weight[3] *= sign
        if quantized:
            quantize(model, mode)
        return watch(model).fingerprint()

    assert name() == name()
    assert len({name(), name(-1), name(quantized=False)}) == 3
