"""Joined layers answer as they did alone, to the bit; nothing stays behind between forwards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from qwen2vl.adapt.int4 import Int4Linear
from qwen2vl.adapt.int8 import Int8Linear, WideInt8Linear
from qwen2vl.adapt.join import Joined, Share, join_siblings
from qwen2vl.adapt.quantise import MODES, Kind, Mode, quantise, quantise_layer, recipe
from qwen2vl.config import Qwen2VLConfig
from tests.adapt.test_quantise import logits_of
from tests.tiny import tiny_config, tiny_model

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def wide_config() -> Qwen2VLConfig:
    """Make q, k and v multiples of 64 outputs, as those of the official models are."""
    raw = tiny_config().to_dict() | {"num_attention_heads": 4, "num_key_value_heads": 4}
    return Qwen2VLConfig.from_dict(raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_answers_are_the_same_to_the_bit(mode: Mode, dtype: torch.dtype) -> None:
    model = tiny_model(config=wide_config()).to(dtype)
    quantise(model, mode)
    want = {tokens: logits_of(model, tokens) for tokens in (4, 8, 60)}
    matrices = {n: model.get_submodule(f"model.layers.1.{n}").dequantised() for n in NAMES}  # type: ignore[union-attr,operator]
    join_siblings(model)
    for name in NAMES:
        share = model.get_submodule(f"model.layers.1.{name}")
        assert isinstance(share, Share)
        assert torch.equal(share.dequantised(), matrices[name])
    for tokens, want_TV in want.items():
        assert torch.equal(logits_of(model, tokens), want_TV)


def test_a_block_has_four_layers_then() -> None:
    model = tiny_model(config=wide_config())
    quantise(model, "int4")
    join_siblings(model)
    kinds = (Int4Linear, Int8Linear, WideInt8Linear)
    layers = [m for m in model.model.layers[0].modules() if isinstance(m, kinds)]
    assert len(layers) == 4


def test_padded_layers_stay_alone() -> None:
    model = tiny_model()  # k and v have 32 outputs, which 4 bits are padded for
    quantise(model, "int4")
    join_siblings(model)
    assert isinstance(model.model.layers[0].self_attn.q_proj, Int4Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, Share)


def test_layers_of_different_kinds_stay_alone() -> None:
    model = tiny_model()
    for name, kind in recipe(model, "int8").items():
        if "q_proj" not in name:
            quantise_layer(model, name, kind)
    quantise_layer(model, "model.layers.0.self_attn.q_proj", Kind(4, 32))
    join_siblings(model)
    assert not isinstance(model.model.layers[0].self_attn.k_proj, Share)
    assert isinstance(model.model.layers[1].self_attn.q_proj, nn.Linear)
    assert isinstance(model.model.layers[1].mlp.gate_proj, Share)


class Counting(nn.Module):
    """Counts how often it computes."""

    out_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x_TI: Tensor) -> Tensor:
        self.count += 1
        return x_TI.repeat(1, 3)


def test_the_first_computes_and_the_last_forgets() -> None:
    layer = Counting()
    joined = Joined(layer)  # type: ignore[arg-type]
    first, second, third = (Share(joined, start, start + 2) for start in (0, 2, 4))
    x_TI = torch.randn(2, 2)
    for expected in (1, 2):  # the same tensor again is computed again: all had their share
        outs = [share(x_TI) for share in (first, second, third)]
        assert layer.count == expected
        assert all(torch.equal(out, x_TI) for out in outs)
    first(x_TI)
    assert torch.equal(first(x_TI + 1), x_TI + 1)  # another input, before the others had theirs
    assert layer.count == 4
    assert torch.equal(third(x_TI), x_TI)
    gone = weakref.ref(x_TI)
    del x_TI, outs
    gc.collect()
    assert gone() is None


def test_a_joined_layer_is_held_once() -> None:
    model = tiny_model(config=wide_config())
    quantise(model, "int8")
    held = sum(b.numel() for b in model.buffers())
    join_siblings(model)
    assert sum(b.numel() for b in model.buffers()) == held
