"""LoRA training compared with PEFT: outputs, gradients of every factor, files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as ReferenceConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.lora.layers import (
    DECODER_TARGET_MODULES,
    LoraConfig,
    LoraFactors,
    extract_factors,
    init_factors,
    inject_lora,
    named_lora_layers,
)
from qwen2vl.lora.peft import parse_peft_adapter, to_peft_config, to_peft_state_dict
from qwen2vl.model import Qwen2VL
from qwen2vl.weights import read_adapter, save_adapter
from tests.parity.reference import (
    compute_logits,
    compute_reference_logits,
    random_model,
    relative_error,
    to_reference,
)
from tests.prompts import Prompt, image, patches, prompt, video
from tests.tiny import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TOLERANCE = 1e-5

CONFIGS: dict[str, dict[str, Any]] = {
    "decoder": {"target_modules": (DECODER_TARGET_MODULES,)},
    "everything, stabilized": {"target_modules": (r".*",), "use_rslora": True},
    "the tower alone": {"target_modules": (r"visual\..*",)},
    "one layer of one block": {"target_modules": (r"model\.layers\.1\.mlp\.up_proj",)},
    "parts of both": {
        "target_modules": (r".*layers\.0.*[qv]_proj", r".*merger\.mlp\.0", r".*attn\.proj")
    },
}


def adapted_model(options: dict[str, Any]) -> tuple[Qwen2VL, LoraConfig]:
    """Build a model with factors as they are after training: B is not zero."""
    model = random_model(tiny_config(tie_word_embeddings=False))
    config = LoraConfig(rank=4, alpha=6, **options)
    generator = torch.Generator().manual_seed(5)
    factors = {
        name: LoraFactors(
            a_RX=found.a_RX,
            b_YR=0.2 * torch.randn(found.b_YR.shape, generator=generator),
            scale=found.scale,
        )
        for name, found in init_factors(model, config, seed=1).items()
    }
    inject_lora(model, factors)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model, config


def save_model_adapter(model: Qwen2VL, config: LoraConfig, folder: Path) -> None:
    """Save the adapter of a model as a training run does."""
    scales = {name: layer.scale for name, layer in named_lora_layers(model)}
    factors = extract_factors(model.state_dict(), scales)
    settings = to_peft_config(config, factors, model, base="some/base")
    save_adapter(folder, settings, to_peft_state_dict(factors))


def base_model(model: Qwen2VL) -> Qwen2VL:
    """Build the base model of an adapted one."""
    base = Qwen2VL(model.config).eval()
    state = {name: t for name, t in model.state_dict().items() if "lora_" not in name}
    base.load_state_dict(state, strict=True)
    return base


def prompt_with_patches(model: Qwen2VL) -> tuple[Prompt, Tensor]:
    media_prompt = prompt([3, image(4, 6), 4, video(2, 4, 4), 5], model.config)
    return media_prompt, patches(media_prompt, model.config)


def loss(logits_TV: Tensor, ids: list[int]) -> Tensor:
    return F.cross_entropy(logits_TV[-5:-1], torch.tensor(ids[-4:]))


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_peft_loads_saved_adapters_with_equal_outputs_and_gradients(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model, config = adapted_model(options)
    save_model_adapter(model, config, tmp_path / "adapter")
    reference = PeftModel.from_pretrained(
        to_reference(base_model(model)), str(tmp_path / "adapter"), is_trainable=True
    ).eval()
    media_prompt, patches_NP = prompt_with_patches(model)

    got_TV = compute_logits(model, media_prompt, patches_NP)
    want_TV = compute_reference_logits(reference, media_prompt, patches_NP, model.config)
    assert relative_error(got_TV, want_TV) < TOLERANCE
    with torch.no_grad():
        assert (
            relative_error(compute_logits(base_model(model), media_prompt, patches_NP), want_TV)
            > 1e-2
        )

    loss(got_TV, media_prompt.ids).backward()
    loss(want_TV, media_prompt.ids).backward()
    peft_gradients = {
        name: parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    compared = 0
    for name, tensor in to_peft_state_dict(dict(factors_with_gradients(model))).items():
        expected = peft_gradients.pop(name.replace(".weight", ".default.weight"))
        assert expected is not None
        assert relative_error(tensor, expected) < TOLERANCE, name
        compared += 1
    assert not peft_gradients
    assert compared == 2 * len(list(named_lora_layers(model)))


def factors_with_gradients(model: Qwen2VL) -> dict[str, LoraFactors]:
    """Return gradients in place of factors, so that `to_peft_state_dict` names them."""
    found: dict[str, LoraFactors] = {}
    for name, layer in named_lora_layers(model):
        assert layer.lora_A.grad is not None and layer.lora_B.grad is not None
        found[name] = LoraFactors(a_RX=layer.lora_A.grad, b_YR=layer.lora_B.grad, scale=layer.scale)
    return found


def test_peft_adapts_exactly_the_same_layers(tmp_path: Path) -> None:
    for number, options in enumerate(CONFIGS.values()):
        model, config = adapted_model(options)
        folder = tmp_path / str(number)
        save_model_adapter(model, config, folder)
        target_modules = read_adapter(folder)[0]["target_modules"]
        adapted_by_peft = get_peft_model(
            to_reference(base_model(model)), ReferenceConfig(target_modules=target_modules)
        )
        assert sum("lora_A" in n for n, _ in adapted_by_peft.named_parameters()) == len(
            list(named_lora_layers(model))
        )
        assert (
            len(target_modules) <= 7
            if options["target_modules"] == (DECODER_TARGET_MODULES,)
            else True
        )


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_of_peft_are_injected_with_equal_outputs(use_rslora: bool, tmp_path: Path) -> None:
    model = random_model(tiny_config(tie_word_embeddings=False))
    torch.manual_seed(2)
    config = ReferenceConfig(
        r=4,
        lora_alpha=6,
        use_rslora=use_rslora,
        init_lora_weights=False,
        target_modules=["q_proj", "down_proj", "qkv", "merger.mlp.2"],
    )
    reference = get_peft_model(to_reference(model), config).eval()
    reference.save_pretrained(str(tmp_path))
    settings, tensors = read_adapter(tmp_path)
    inject_lora(model, parse_peft_adapter(settings, tensors, model, where="adapter"))
    media_prompt, patches_NP = prompt_with_patches(model)
    with torch.no_grad():
        want_TV = compute_reference_logits(reference, media_prompt, patches_NP, model.config)
        assert relative_error(compute_logits(model, media_prompt, patches_NP), want_TV) < TOLERANCE
    assert len(list(named_lora_layers(model))) == 7


def test_saved_adapter_is_loaded_to_the_bit(tmp_path: Path) -> None:
    model, config = adapted_model({"target_modules": (r".*",)})
    save_model_adapter(model, config, tmp_path / "adapter")
    settings, tensors = read_adapter(tmp_path / "adapter")
    base = base_model(model)
    inject_lora(base, parse_peft_adapter(settings, tensors, base, where="adapter"))
    media_prompt, patches_NP = prompt_with_patches(model)
    with torch.no_grad():
        assert torch.equal(
            compute_logits(base, media_prompt, patches_NP),
            compute_logits(model, media_prompt, patches_NP),
        )
