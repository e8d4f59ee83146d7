"""Joined layers answer as they did alone, to the bit; nothing stays behind between forwards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from qwen2vl.linear.fused import Joined, Share, siblings
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.scheme import (
    MODES,
    Mode,
    quantize,
    quantize_layers,
    recipe,
)
from tests.quantization.test_scheme import logits_of
from tests.tiny import tiny_model


def apart(model: Qwen2VL, mode: Mode) -> None:
    """Quantize every layer by itself."""
    for name, kind in recipe(model, mode).items():
        quantize_layers(model, [name], kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_answers_are_the_same_to_the_bit(mode: Mode, dtype: torch.dtype) -> None:
    joined, alone = tiny_model().to(dtype), tiny_model().to(dtype)
    kinds = recipe(alone, mode)
    quantize(joined, mode)
    apart(alone, mode)
    for name in kinds:
        ours, theirs = joined.get_submodule(name), alone.get_submodule(name)
        assert isinstance(ours | Share)
        assert isinstance(theirs)
        assert torch.equal(ours.integers(), theirs.integers())
        assert torch.equal(ours.dequantized(), theirs.dequantized())
    for tokens in (4, 8, 60):
        assert torch.equal(logits_of(joined, tokens), logits_of(alone, tokens))


def test_a_block_has_four_layers_then() -> None:
    model = tiny_model()
    quantize(model, "int4")
    names = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    shares = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, Share)}
    assert shares == names
    layers = [m for m in model.model.layers[0].modules() if isinstance(m)]
    assert len(layers) == 4


def test_only_layers_of_one_kind_are_siblings() -> None:
    kinds = {
        "a.q_proj": 8,
        "a.k_proj": 4,
        "a.v_proj": 8,
        "a.o_proj": 8,
        "b.q_proj": 8,
        "b.gate_proj": 4,
        "b.up_proj": 4,
        "lm_head": 8,
    }
    assert siblings(kinds) == [
        (("a.q_proj", "a.v_proj"), 8),
        (("a.k_proj",), 4),
        (("a.o_proj",), 8),
        (("b.q_proj",), 8),
        (("b.gate_proj", "b.up_proj"), 4),
        (("lm_head",), 8),
    ]


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
    joined, alone = tiny_model(), tiny_model()
    quantize(joined, "int8")
    apart(alone, "int8")
    assert sum(b.numel() for b in joined.buffers()) == sum(b.numel() for b in alone.buffers())
