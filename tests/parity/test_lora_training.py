"""Adapters in training beside PEFT's: outputs, gradients of every factor, files both ways."""

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
    DECODER,
    LoraConfig,
    LoraFactors,
    factors_of,
    fresh_factors,
    lora_layers,
    put_lora,
)
from qwen2vl.lora.peft import peft_settings, peft_tensors, read_lora
from qwen2vl.model import Qwen2VL
from qwen2vl.weights import read_adapter, save_adapter
from tests.parity.oracle import ask, ask_reference, random_model, relative_error, twin
from tests.prompts import Prompt, image, patches, prompt, video
from tests.tiny import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TOLERANCE = 1e-5

CHOICES: dict[str, dict[str, Any]] = {
    "decoder": {"targets": (DECODER,)},
    "everything, stabilized": {"targets": (r".*",), "rank_stabilized": True},
    "the tower alone": {"targets": (r"visual\..*",)},
    "one layer of one block": {"targets": (r"model\.layers\.1\.mlp\.up_proj",)},
    "parts of both": {"targets": (r".*layers\.0.*[qv]_proj", r".*merger\.mlp\.0", r".*attn\.proj")},
}


def adapted(options: dict[str, Any]) -> tuple[Qwen2VL, LoraConfig]:
    """Build a model with factors as they are after some training."""
    model = random_model(tiny_config(tie_word_embeddings=False))
    config = LoraConfig(rank=4, alpha=6, **options)
    generator = torch.Generator().manual_seed(5)
    factors = {
        name: LoraFactors(
            a_RX=found.a_RX,
            b_YR=0.2 * torch.randn(found.b_YR.shape, generator=generator),
            scale=found.scale,
        )
        for name, found in fresh_factors(model, config, seed=1).items()
    }
    put_lora(model, factors)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model, config


def saved(model: Qwen2VL, config: LoraConfig, folder: Path) -> None:
    """Write the adapter of a model as a run does at its end."""
    scales = {name: layer.scale for name, layer in lora_layers(model)}
    factors = factors_of(model.state_dict(), scales)
    settings = peft_settings(config, factors, model, base="some/base")
    save_adapter(folder, settings, peft_tensors(factors))


def plain(model: Qwen2VL) -> Qwen2VL:
    """Build the model beneath an adapted one."""
    base = Qwen2VL(model.config).eval()
    state = {name: t for name, t in model.state_dict().items() if "lora_" not in name}
    base.load_state_dict(state, strict=True)
    return base


def question(model: Qwen2VL) -> tuple[Prompt, Tensor]:
    asked = prompt([3, image(4, 6), 4, video(2, 4, 4), 5], model.config)
    return asked, patches(asked, model.config)


def loss(logits_TV: Tensor, ids: list[int]) -> Tensor:
    return F.cross_entropy(logits_TV[-5:-1], torch.tensor(ids[-4:]))


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES.keys())
def test_peft_reads_ours_and_has_the_same_outputs_and_gradients(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model, config = adapted(options)
    saved(model, config, tmp_path / "adapter")
    reference = PeftModel.from_pretrained(
        twin(plain(model)), str(tmp_path / "adapter"), is_trainable=True
    ).eval()
    asked, patches_NP = question(model)

    got_TV = ask(model, asked, patches_NP)
    want_TV = ask_reference(reference, asked, patches_NP, model.config)
    assert relative_error(got_TV, want_TV) < TOLERANCE
    with torch.no_grad():
        assert relative_error(ask(plain(model), asked, patches_NP), want_TV) > 1e-2

    loss(got_TV, asked.ids).backward()
    loss(want_TV, asked.ids).backward()
    theirs = {
        name: parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    compared = 0
    for name, tensor in peft_tensors(dict(factors_with_gradients(model))).items():
        want = theirs.pop(name.replace(".weight", ".default.weight"))
        assert want is not None
        assert relative_error(tensor, want) < TOLERANCE, name
        compared += 1
    assert not theirs
    assert compared == 2 * len(list(lora_layers(model)))


def factors_with_gradients(model: Qwen2VL) -> dict[str, LoraFactors]:
    """Put the gradients where the factors are, to be named as those are."""
    found: dict[str, LoraFactors] = {}
    for name, layer in lora_layers(model):
        assert layer.lora_A.grad is not None and layer.lora_B.grad is not None
        found[name] = LoraFactors(a_RX=layer.lora_A.grad, b_YR=layer.lora_B.grad, scale=layer.scale)
    return found


def test_peft_adapts_exactly_the_layers_that_we_did(tmp_path: Path) -> None:
    for number, options in enumerate(CHOICES.values()):
        model, config = adapted(options)
        folder = tmp_path / str(number)
        saved(model, config, folder)
        targets = read_adapter(folder)[0]["target_modules"]
        again = get_peft_model(twin(plain(model)), ReferenceConfig(target_modules=targets))
        assert sum("lora_A" in n for n, _ in again.named_parameters()) == len(
            list(lora_layers(model))
        )
        assert len(targets) <= 7 if options["targets"] == (DECODER,) else True


@pytest.mark.parametrize("stabilized", [False, True])
def test_what_peft_saves_is_learned_on_with_the_same_outputs(
    stabilized: bool, tmp_path: Path
) -> None:
    model = random_model(tiny_config(tie_word_embeddings=False))
    torch.manual_seed(2)
    config = ReferenceConfig(
        r=4,
        lora_alpha=6,
        use_rslora=stabilized,
        init_lora_weights=False,
        target_modules=["q_proj", "down_proj", "qkv", "merger.mlp.2"],
    )
    reference = get_peft_model(twin(model), config).eval()
    reference.save_pretrained(str(tmp_path))
    settings, tensors = read_adapter(tmp_path)
    put_lora(model, read_lora(settings, tensors, model, where="adapter"))
    asked, patches_NP = question(model)
    with torch.no_grad():
        want_TV = ask_reference(reference, asked, patches_NP, model.config)
        assert relative_error(ask(model, asked, patches_NP), want_TV) < TOLERANCE
    assert len(list(lora_layers(model))) == 7


def test_an_adapter_comes_back_from_its_file_to_the_bit(tmp_path: Path) -> None:
    model, config = adapted({"targets": (r".*",)})
    saved(model, config, tmp_path / "adapter")
    settings, tensors = read_adapter(tmp_path / "adapter")
    base = plain(model)
    put_lora(base, read_lora(settings, tensors, base, where="adapter"))
    asked, patches_NP = question(model)
    with torch.no_grad():
        assert torch.equal(ask(base, asked, patches_NP), ask(model, asked, patches_NP))
