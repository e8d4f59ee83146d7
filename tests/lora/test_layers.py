"""Layers that learn beside their weights: what they compute, who they are, how they are merged.

Gradients and files are compared with PEFT's in tests/parity/test_lora_training.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen2vl.errors import ConfigError
from qwen2vl.lora.layers import (
    DECODER,
    LoraConfig,
    LoraFactors,
    LoraLinear,
    factors_of,
    fresh_factors,
    lora_layers,
    merge_in_place,
    merge_lora,
    merged_state,
    put_lora,
    unmerge,
)
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.nf4 import Nf4Weight, Quantize
from tests.parity.oracle import packed, relative_error
from tests.prompts import image, patches, prompt
from tests.tiny import tiny_config, tiny_model

Q = "model.layers.1.self_attn.q_proj"
QKV = "visual.blocks.0.attn.qkv"


def learned(model: Qwen2VL, **options: Any) -> dict[str, LoraFactors]:
    """Factors as they are after training: B is not zero any more."""
    generator = torch.Generator().manual_seed(3)
    fresh = fresh_factors(model, LoraConfig(**options), seed=1)
    return {
        name: LoraFactors(
            a_RX=f.a_RX, b_YR=0.1 * torch.randn(f.b_YR.shape, generator=generator), scale=f.scale
        )
        for name, f in fresh.items()
    }


def ask(model: Qwen2VL) -> Tensor:
    question = prompt([3, image(4, 6), 4], model.config)
    return model.logits(
        model(**packed([question], [patches(question, model.config)], model.config))
    )


def test_fresh_factors_change_nothing() -> None:
    model = tiny_model()
    with torch.no_grad():
        before = ask(model)
        put_lora(model, fresh_factors(model, LoraConfig(targets=(r".*",)), seed=1))
        assert torch.equal(ask(model), before)


def test_factors_are_drawn_from_the_seed() -> None:
    one, two, other = (fresh_factors(tiny_model(), LoraConfig(rank=3), seed=s) for s in (1, 1, 2))
    assert torch.equal(one[Q].a_RX, two[Q].a_RX)
    assert not torch.equal(one[Q].a_RX, other[Q].a_RX)
    assert one[Q].a_RX.shape == (3, 64)
    assert one[Q].a_RX.abs().max() <= 1 / 8


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_the_formula(stabilized: bool, scale: float) -> None:
    model = tiny_model()
    layer = model.get_submodule(Q)
    assert isinstance(layer, nn.Linear)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    factors = learned(model, rank=4, alpha=6, rank_stabilized=stabilized)
    want = layer(x) + scale * x @ (factors[Q].b_YR @ factors[Q].a_RX).T
    put_lora(model, factors)
    torch.testing.assert_close(model.get_submodule(Q)(x), want)


def test_names_of_parameters_stay_and_two_come_for_each_layer() -> None:
    model = tiny_model()
    before = set(model.state_dict())
    put_lora(model, learned(model, targets=(QKV.replace(".", r"\."),)))
    assert set(model.state_dict()) - before == {f"{QKV}.lora_A", f"{QKV}.lora_B"}
    assert before <= set(model.state_dict())


def test_any_linear_layer_of_either_tower_can_learn() -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=False))
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    put_lora(model, fresh_factors(model, LoraConfig(targets=(r".*",)), seed=0))
    assert {name for name, _ in lora_layers(model)} == linears - {"lm_head"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ask(model).square().sum().backward()
    for name, layer in lora_layers(model):
        assert layer.lora_B.grad is not None, name
        # While B is zero nothing flows to A.
        assert layer.lora_B.grad.any() and not layer.lora_A.grad.any(), name
        assert layer.weight.grad is None


@pytest.mark.parametrize("quantize", ["none", "nf4", "nf4_double"])
def test_merged_computes_the_same_and_unmerged_is_as_before_to_the_bit(quantize: Quantize) -> None:
    model = tiny_model()
    put_lora(model, learned(model, targets=(DECODER, r"visual.*qkv")), quantize=quantize)
    with torch.no_grad():
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        apart = ask(model)
        merge_in_place(model)
        merged = ask(model)
        assert not torch.equal(merged, apart)
        assert relative_error(merged, apart) < 1e-5
        unmerge(model)
        assert torch.equal(ask(model), apart)
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("quantize", ["none", "nf4", "nf4_double"])
def test_a_state_is_merged_by_names_alone(quantize: Quantize) -> None:
    plain, model = tiny_model(), tiny_model()
    factors = learned(plain, targets=(DECODER, r"visual.*"))
    put_lora(model, factors, quantize=quantize)
    scales = {name: layer.scale for name, layer in lora_layers(model)}
    state = merged_state(model.state_dict(), scales)
    assert state.keys() == plain.state_dict().keys()
    for name in factors if quantize != "none" else ():
        weight = plain.get_parameter(f"{name}.weight")
        weight.data = Nf4Weight(weight, double=quantize == "nf4_double").dequantized()
    merge_lora(plain, factors)
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    back = factors_of(model.state_dict(), scales)
    assert all(torch.equal(back[name].b_YR, factors[name].b_YR) for name in factors)


def test_a_merged_weight_is_rounded_once() -> None:
    model = tiny_model().to(torch.bfloat16)
    before = model.get_parameter(f"{Q}.weight").float()
    factors = learned(model, rank=4, alpha=6)
    put_lora(model, factors)
    state = merged_state(model.state_dict(), {n: layer.scale for n, layer in lora_layers(model)})
    want = before + 1.5 * factors[Q].b_YR @ factors[Q].a_RX
    assert torch.equal(state[f"{Q}.weight"], want.bfloat16())


def test_dropout_is_for_training_and_for_the_change_alone() -> None:
    model = tiny_model()
    put_lora(model, learned(model), dropout=0.5)
    layer = model.get_submodule(Q)
    assert isinstance(layer, LoraLinear)
    x = torch.ones(2000, 64)
    with torch.no_grad():
        quiet = layer(x)
        assert torch.equal(layer(x), quiet)
        layer.train()
        loud = layer(x)
        assert not torch.equal(loud, quiet)
        torch.testing.assert_close(loud.mean(0), quiet.mean(0), rtol=0, atol=0.2)
        layer.lora_B.zero_()
        assert torch.equal(layer(x), layer.eval()(x))


def test_a_short_weight_has_precise_factors() -> None:
    model = tiny_model().to(torch.bfloat16)
    put_lora(model, learned(model))
    layer = model.get_submodule(Q)
    assert isinstance(layer, LoraLinear)
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32
    assert layer(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 64)).dtype == torch.bfloat16


def test_a_quantized_base_is_all_that_is_kept_of_a_weight() -> None:
    model = tiny_model()
    put_lora(model, learned(model), quantize="nf4")
    layer = model.get_submodule(Q)
    assert isinstance(layer, LoraLinear)
    assert layer.weight is None
    assert f"{Q}.weight" not in model.state_dict()
    assert f"{Q}.nf4.codes" in model.state_dict()
    assert [n for n, _ in layer.named_parameters()] == ["bias", "lora_A", "lora_B"]


def test_an_adapted_model_comes_back_from_its_state() -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    put_lora(model, learned(model), quantize="nf4_double")
    put_lora(other, fresh_factors(other, LoraConfig(), seed=9), quantize="nf4_double")
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(ask(other), ask(model))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"targets": (r"model.*q_prj",)}, r"targets: 'model\.\*q_prj' matches no linear layer; na"),
        ({"targets": (r".*q_proj", r"visual\.blocks")}, r"'visual\\\\.blocks' matches no linear"),
        ({"targets": ("lm_head",)}, "'lm_head' matches no linear layer"),
        ({"targets": ("(",)}, r"targets: '\(' is no pattern: missing \)"),
        ({"rank": 0}, "adapter: rank is 0, must be at least 1"),
        ({"alpha": 0.0, "dropout": 1.0}, r"alpha is 0\.0, must be above 0; dropout is 1\.0, must"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], text: str) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=False))
    with pytest.raises(ConfigError, match=text):
        fresh_factors(model, LoraConfig(**options), seed=0)


def test_the_head_of_a_read_adapter_cannot_learn_on() -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=False))
    rows = model.config.text.vocab_size
    factors = LoraFactors(a_RX=torch.ones(2, 64), b_YR=torch.ones(rows, 2), scale=1.0)
    with pytest.raises(ConfigError, match="lm_head: the head cannot be adapted while training"):
        put_lora(model, {"lm_head": factors})


@pytest.mark.parametrize("quantize", ["nf4", "nf4_double"])
def test_gradients_over_a_quantized_base_are_those_over_the_widened_one(quantize: Quantize) -> None:
    narrow, wide = tiny_model(), tiny_model()
    factors = learned(narrow, targets=(DECODER, r"visual.*"))
    put_lora(narrow, factors, quantize=quantize)
    put_lora(wide, factors)
    for name, layer in lora_layers(narrow):
        assert layer.nf4 is not None
        wide.get_parameter(f"{name}.weight").data = layer.nf4.dequantized()
    for model in (narrow, wide):
        ask(model).log_softmax(-1)[:, 0].sum().backward()
    for (name, layer), (_, other) in zip(lora_layers(narrow), lora_layers(wide), strict=True):
        assert layer.lora_A.grad is not None and other.lora_A.grad is not None
        assert relative_error(layer.lora_A.grad, other.lora_A.grad) < 1e-5, name
