"""LoRA layers: forward, target modules, merging, state dicts, quantized bases.

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
    DECODER_TARGET_MODULES,
    LoraConfig,
    LoraFactors,
    LoraLinear,
    extract_factors,
    init_factors,
    inject_lora,
    merge_adapter,
    merge_lora,
    merge_state_dict,
    named_lora_layers,
    unmerge_adapter,
)
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.nf4 import BaseQuantization, Nf4Weight
from tests.parity.reference import pack_prompts, relative_error
from tests.prompts import image, patches, prompt
from tests.tiny import tiny_config, tiny_model

Q = "model.layers.1.self_attn.q_proj"
QKV = "visual.blocks.0.attn.qkv"


def trained_factors(model: Qwen2VL, **options: Any) -> dict[str, LoraFactors]:
    """Draw factors as they are after training: B is not zero."""
    generator = torch.Generator().manual_seed(3)
    fresh = init_factors(model, LoraConfig(**options), seed=1)
    return {
        name: LoraFactors(
            a_RX=f.a_RX, b_YR=0.1 * torch.randn(f.b_YR.shape, generator=generator), scale=f.scale
        )
        for name, f in fresh.items()
    }


def compute_logits(model: Qwen2VL) -> Tensor:
    prompt_with_image = prompt([3, image(4, 6), 4], model.config)
    return model.logits(
        model(
            **pack_prompts(
                [prompt_with_image], [patches(prompt_with_image, model.config)], model.config
            )
        )
    )


def test_initial_factors_do_not_change_the_output() -> None:
    model = tiny_model()
    with torch.no_grad():
        before = compute_logits(model)
        inject_lora(model, init_factors(model, LoraConfig(target_modules=(r".*",)), seed=1))
        assert torch.equal(compute_logits(model), before)


def test_factors_are_drawn_from_the_seed() -> None:
    first, same_seed, other = (
        init_factors(tiny_model(), LoraConfig(rank=3), seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(first[Q].a_RX, same_seed[Q].a_RX)
    assert not torch.equal(first[Q].a_RX, other[Q].a_RX)
    assert first[Q].a_RX.shape == (3, 64)
    assert first[Q].a_RX.abs().max() <= 1 / 8


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_forward_equals_the_formula(use_rslora: bool, scale: float) -> None:
    model = tiny_model()
    layer = model.get_submodule(Q)
    assert isinstance(layer, nn.Linear)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    factors = trained_factors(model, rank=4, alpha=6, use_rslora=use_rslora)
    want = layer(x) + scale * x @ (factors[Q].b_YR @ factors[Q].a_RX).T
    inject_lora(model, factors)
    torch.testing.assert_close(model.get_submodule(Q)(x), want)


def test_injection_adds_two_parameters_per_layer() -> None:
    model = tiny_model()
    before = set(model.state_dict())
    inject_lora(model, trained_factors(model, target_modules=(QKV.replace(".", r"\."),)))
    assert set(model.state_dict()) - before == {f"{QKV}.lora_A", f"{QKV}.lora_B"}
    assert before <= set(model.state_dict())


def test_any_linear_layer_but_the_head_can_be_adapted() -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=False))
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inject_lora(model, init_factors(model, LoraConfig(target_modules=(r".*",)), seed=0))
    assert {name for name, _ in named_lora_layers(model)} == linears - {"lm_head"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    compute_logits(model).square().sum().backward()
    for name, layer in named_lora_layers(model):
        assert layer.lora_B.grad is not None, name
        # While B is zero the gradient of A is zero.
        assert layer.lora_B.grad.any() and not layer.lora_A.grad.any(), name
        assert layer.weight.grad is None


@pytest.mark.parametrize("quantize", ["none", "nf4", "nf4_double"])
def test_merge_keeps_the_output_and_unmerge_restores_to_the_bit(
    quantize: BaseQuantization,
) -> None:
    model = tiny_model()
    inject_lora(
        model,
        trained_factors(model, target_modules=(DECODER_TARGET_MODULES, r"visual.*qkv")),
        quantize=quantize,
    )
    with torch.no_grad():
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        unmerged = compute_logits(model)
        merge_adapter(model)
        merged = compute_logits(model)
        assert not torch.equal(merged, unmerged)
        assert relative_error(merged, unmerged) < 1e-5
        unmerge_adapter(model)
        assert torch.equal(compute_logits(model), unmerged)
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("quantize", ["none", "nf4", "nf4_double"])
def test_merge_state_dict_equals_merge_lora(quantize: BaseQuantization) -> None:
    plain, model = tiny_model(), tiny_model()
    factors = trained_factors(plain, target_modules=(DECODER_TARGET_MODULES, r"visual.*"))
    inject_lora(model, factors, quantize=quantize)
    scales = {name: layer.scale for name, layer in named_lora_layers(model)}
    state = merge_state_dict(model.state_dict(), scales)
    assert state.keys() == plain.state_dict().keys()
    for name in factors if quantize != "none" else ():
        weight = plain.get_parameter(f"{name}.weight")
        weight.data = Nf4Weight(weight, double=quantize == "nf4_double").dequantize()
    merge_lora(plain, factors)
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    extracted = extract_factors(model.state_dict(), scales)
    assert all(torch.equal(extracted[name].b_YR, factors[name].b_YR) for name in factors)


def test_merged_weight_is_rounded_once() -> None:
    model = tiny_model().to(torch.bfloat16)
    before = model.get_parameter(f"{Q}.weight").float()
    factors = trained_factors(model, rank=4, alpha=6)
    inject_lora(model, factors)
    state = merge_state_dict(
        model.state_dict(), {n: layer.scale for n, layer in named_lora_layers(model)}
    )
    want = before + 1.5 * factors[Q].b_YR @ factors[Q].a_RX
    assert torch.equal(state[f"{Q}.weight"], want.bfloat16())


def test_dropout_applies_in_training_and_to_the_delta_only() -> None:
    model = tiny_model()
    inject_lora(model, trained_factors(model), dropout=0.5)
    layer = model.get_submodule(Q)
    assert isinstance(layer, LoraLinear)
    x = torch.ones(2000, 64)
    with torch.no_grad():
        eval_out = layer(x)
        assert torch.equal(layer(x), eval_out)
        layer.train()
        train_out = layer(x)
        assert not torch.equal(train_out, eval_out)
        torch.testing.assert_close(train_out.mean(0), eval_out.mean(0), rtol=0, atol=0.2)
        layer.lora_B.zero_()
        assert torch.equal(layer(x), layer.eval()(x))


def test_factors_stay_float32_beside_bfloat16_weights() -> None:
    model = tiny_model().to(torch.bfloat16)
    inject_lora(model, trained_factors(model))
    layer = model.get_submodule(Q)
    assert isinstance(layer, LoraLinear)
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32
    assert layer(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 64)).dtype == torch.bfloat16


def test_quantized_base_replaces_the_weight() -> None:
    model = tiny_model()
    inject_lora(model, trained_factors(model), quantize="nf4")
    layer = model.get_submodule(Q)
    assert isinstance(layer, LoraLinear)
    assert layer.weight is None
    assert f"{Q}.weight" not in model.state_dict()
    assert f"{Q}.nf4.codes" in model.state_dict()
    assert [n for n, _ in layer.named_parameters()] == ["bias", "lora_A", "lora_B"]


def test_adapted_model_loads_its_state_dict() -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    inject_lora(model, trained_factors(model), quantize="nf4_double")
    inject_lora(other, init_factors(other, LoraConfig(), seed=9), quantize="nf4_double")
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(compute_logits(other), compute_logits(model))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"target_modules": (r"model.*q_prj",)},
            r"target_modules: 'model\.\*q_prj' matches no linear layer; na",
        ),
        (
            {"target_modules": (r".*q_proj", r"visual\.blocks")},
            r"'visual\\\\.blocks' matches no linear",
        ),
        ({"target_modules": ("lm_head",)}, "'lm_head' matches no linear layer"),
        ({"target_modules": ("(",)}, r"target_modules: '\(' is no pattern: missing \)"),
        ({"rank": 0}, "adapter: rank is 0, must be at least 1"),
        ({"alpha": 0.0, "dropout": 1.0}, r"alpha is 0\.0, must be above 0; dropout is 1\.0, must"),
    ],
)
def test_invalid_configs_are_refused(options: dict[str, Any], text: str) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=False))
    with pytest.raises(ConfigError, match=text):
        init_factors(model, LoraConfig(**options), seed=0)


def test_head_of_a_loaded_adapter_cannot_be_trained() -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=False))
    num_outputs = model.config.text.vocab_size
    factors = LoraFactors(a_RX=torch.ones(2, 64), b_YR=torch.ones(num_outputs, 2), scale=1.0)
    with pytest.raises(ConfigError, match="lm_head: the head cannot be adapted while training"):
        inject_lora(model, {"lm_head": factors})


@pytest.mark.parametrize("quantize", ["nf4", "nf4_double"])
def test_gradients_equal_those_with_the_dequantized_base(
    quantize: BaseQuantization,
) -> None:
    quantized, dequantized = tiny_model(), tiny_model()
    factors = trained_factors(quantized, target_modules=(DECODER_TARGET_MODULES, r"visual.*"))
    inject_lora(quantized, factors, quantize=quantize)
    inject_lora(dequantized, factors)
    for name, layer in named_lora_layers(quantized):
        assert layer.nf4 is not None
        dequantized.get_parameter(f"{name}.weight").data = layer.nf4.dequantize()
    for model in (quantized, dequantized):
        compute_logits(model).log_softmax(-1)[:, 0].sum().backward()
    for (name, layer), (_, other) in zip(
        named_lora_layers(quantized), named_lora_layers(dequantized), strict=True
    ):
        assert layer.lora_A.grad is not None and other.lora_A.grad is not None
        assert relative_error(layer.lora_A.grad, other.lora_A.grad) < 1e-5, name
