"""Weights saved in full with an adapter, merged here, compute what PEFT computes."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwen2vl.convert import quantize_folder
from qwen2vl.engine import LLM
from qwen2vl.errors import CheckpointError
from qwen2vl.loading import load
from qwen2vl.model import Qwen2VL
from tests.folders import write_tiny
from tests.parity.reference import (
    compute_logits,
    compute_reference_logits,
    random_model,
    relative_error,
    to_reference,
)
from tests.prompts import image, patches, prompt
from tests.tiny import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Qwen2VL]:
    folder = tmp_path_factory.mktemp("base") / "model"
    model = random_model(tiny_config(tie_word_embeddings=request.param))
    return folder, write_tiny(folder, model=model)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen2VL]:
    folder = tmp_path_factory.mktemp("untied") / "model"
    model = random_model(tiny_config(tie_word_embeddings=False))
    return folder, write_tiny(folder, model=model)


def peft_model(model: Qwen2VL, **options: Any) -> Any:
    """Wrap the transformers copy of a model; random factors on two layers of the decoder."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights=False,
        **{"target_modules": ["q_proj", "down_proj"], **options},
    )
    return get_peft_model(to_reference(model), config).eval()


@torch.no_grad()
def train(adapted: Any, is_trained: Callable[[str], bool]) -> dict[str, Tensor]:
    """Change parameters as training does; return them under PEFT's names in memory."""
    trained = {name: p for name, p in adapted.named_parameters() if is_trained(name)}
    for parameter in trained.values():
        parameter.add_(0.3 * torch.randn(parameter.shape))
    assert trained
    return {name: p.detach().clone() for name, p in trained.items()}


def check_logits(folder: Path, model: Qwen2VL, adapter: Path, adapted: nn.Module) -> None:
    prompt_with_image = prompt([3, image(4, 6), 4, 5], model.config)
    patches_NP = patches(prompt_with_image, model.config)
    loaded, _ = load(folder, dtype="float32", adapter=adapter)
    with torch.no_grad():
        want_TV = compute_reference_logits(adapted, prompt_with_image, patches_NP, model.config)
        got_TV = compute_logits(loaded, prompt_with_image, patches_NP)
        plain_TV = compute_logits(model, prompt_with_image, patches_NP)
    assert relative_error(got_TV, want_TV) < 1e-5
    assert relative_error(plain_TV, want_TV) > 1e-2


@pytest.mark.parametrize(
    "modules",
    [
        ["visual"],
        ["merger"],
        ["merger.mlp.2", "norm"],
        ["v_proj"],
        ["patch_embed.proj", "layers.1.input_layernorm"],
    ],
    ids=str,
)
def test_modules_to_save(base: tuple[Path, Qwen2VL], tmp_path: Path, modules: list[str]) -> None:
    folder, model = base
    adapted = peft_model(model, modules_to_save=modules)
    train(adapted, lambda name: "modules_to_save" in name)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    check_logits(folder, model, tmp_path / "adapter", adapted)


@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]])
def test_embedding_and_head(base: tuple[Path, Qwen2VL], tmp_path: Path, modules: list[str]) -> None:
    """In a tied model PEFT trains them apart, which is refused."""
    folder, model = base
    adapted = peft_model(model, modules_to_save=modules)
    train(adapted, lambda name: "modules_to_save" in name)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    if model.lm_head is None:
        with pytest.raises(CheckpointError, match="was trained apart from the other"):
            load(folder, adapter=tmp_path / "adapter", dtype="float32")
    else:
        check_logits(folder, model, tmp_path / "adapter", adapted)


def test_tied_weights_that_peft_trains_together(tmp_path: Path) -> None:
    folder, config = tmp_path / "model", tiny_config(tie_word_embeddings=True)
    model = write_tiny(folder, model=random_model(config))
    adapted = peft_model(model, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    train(adapted, lambda name: "embed_tokens.modules_to_save" in name)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    check_logits(folder, model, tmp_path / "adapter", adapted)


def test_embeddings_that_peft_saves_unasked(base: tuple[Path, Qwen2VL], tmp_path: Path) -> None:
    """As save_embedding_layers does: those of the model itself, changed in place."""
    folder, model = base
    adapted = peft_model(model)
    train(adapted, lambda name: "embed_tokens" in name)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    check_logits(folder, model, tmp_path / "adapter", adapted)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(base: tuple[Path, Qwen2VL], tmp_path: Path, bias: str) -> None:
    folder, model = base
    adapted = peft_model(model, bias=bias, target_modules=["q_proj", "qkv"])
    train(adapted, lambda name: name.endswith("bias") and (bias == "all" or "base_layer" in name))
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    check_logits(folder, model, tmp_path / "adapter", adapted)


def save_beside(
    model: Qwen2VL, folder: Path, is_trained: Callable[[str], bool]
) -> tuple[Any, dict[str, Tensor]]:
    """Save an adapter's factors alone; return the model and what the trainer saves beside them."""
    adapted = peft_model(model)
    trained = train(adapted, is_trained)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted, trained


def is_vision(name: str) -> bool:
    return ".visual." in name


def test_vision_tower_in_a_file_beside_the_adapter(
    base: tuple[Path, Qwen2VL], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ms-swift, with a full vision tower and LoRA in the decoder."""
    folder, model = base
    adapted, trained = save_beside(model, tmp_path / "adapter", is_vision)
    save_file(trained, tmp_path / "adapter" / "vit.safetensors")
    with caplog.at_level(logging.WARNING):
        check_logits(folder, model, tmp_path / "adapter", adapted)
    note = f"{len(trained)} tensors of visual.* replaced by vit.safetensors"
    assert any(note in record.getMessage() for record in caplog.records)


def test_base_weights_below_the_factors(base: tuple[Path, Qwen2VL], tmp_path: Path) -> None:
    """What is replaced is the weight that the factors are added to."""
    folder, model = base
    adapted, trained = save_beside(
        model, tmp_path / "adapter", lambda name: "q_proj.base_layer.weight" in name
    )
    save_file(trained, tmp_path / "adapter" / "trained.safetensors")
    check_logits(folder, model, tmp_path / "adapter", adapted)


@pytest.mark.parametrize(
    "file",
    ["non_lora_state_dict.bin", pytest.param("non_lora_trainables.bin", marks=pytest.mark.slow)],
)
def test_pickles_are_refused_with_a_command_that_works(
    base: tuple[Path, Qwen2VL], tmp_path: Path, file: str
) -> None:
    """Qwen2-VL-Finetune and LLaVA: the command of the error converts, and the result loads."""
    folder, model = base
    adapted, trained = save_beside(
        model, tmp_path / "adapter", lambda name: "visual.merger" in name or "norm.weight" in name
    )
    torch.save(trained, tmp_path / "adapter" / file)
    with pytest.raises(CheckpointError) as caught:
        load(folder, adapter=tmp_path / "adapter", dtype="float32")
    assert f"{file} may hold weights that were trained with the adapter" in str(caught.value)
    command = re.search(r'python -c "(.+?)"; remove it', str(caught.value))
    assert command is not None
    subprocess.run([sys.executable, "-c", command[1]], cwd=tmp_path / "adapter", check=True)
    check_logits(folder, model, tmp_path / "adapter", adapted)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", ""),
        ("base_model.model.", "module.base_model.model."),
        ("base_model.model.model.visual.", "visual."),
        ("base_model.model.model.visual.", "base_model.model.visual."),
        ("base_model.model.", "_orig_mod.base_model.model."),
    ],
)
def test_names_of_every_wrapper(
    untied: tuple[Path, Qwen2VL], tmp_path: Path, old: str, new: str
) -> None:
    folder, model = untied
    _, trained = save_beside(model, tmp_path / "adapter", is_vision)
    path = tmp_path / "adapter" / "vit.safetensors"
    save_file(trained, path)
    want = load(folder, dtype="float32", adapter=tmp_path / "adapter")[0].state_dict()
    save_file({name.replace(old, new): tensor for name, tensor in trained.items()}, path)
    got = load(folder, dtype="float32", adapter=tmp_path / "adapter")[0].state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not torch.equal(got["visual.merger.mlp.0.weight"], model.visual.merger.mlp[0].weight)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_replaced_weights_are_quantized(
    untied: tuple[Path, Qwen2VL], tmp_path: Path, quantize: Any
) -> None:
    """As those of a folder that holds the merged weights."""
    folder, model = untied
    adapted = peft_model(model, modules_to_save=["mlp.gate_proj", "merger"])
    train(adapted, lambda name: "modules_to_save" in name)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    merged, _ = load(folder, dtype="float32", adapter=tmp_path / "adapter")
    write_tiny(tmp_path / "merged", model=merged)
    want, _ = load(tmp_path / "merged", dtype="float32", quantize=quantize)
    got, _ = load(folder, dtype="float32", quantize=quantize, adapter=tmp_path / "adapter")
    prompt_with_image = prompt([3, image(4, 6), 4, 5], model.config)
    patches_NP = patches(prompt_with_image, model.config)
    with torch.no_grad():
        want_TV, got_TV = (compute_logits(m, prompt_with_image, patches_NP) for m in (want, got))
    assert torch.equal(got_TV, want_TV)


def test_quantized_folders_take_what_they_store_unquantized(
    untied: tuple[Path, Qwen2VL], tmp_path: Path
) -> None:
    folder, model = untied
    quantize_folder(folder, tmp_path / "int4", "int4")
    for name, modules in (("norms", ["input_layernorm"]), ("layers", ["gate_proj"])):
        adapted = peft_model(model, target_modules=["lm_head"], modules_to_save=modules)
        train(adapted, lambda name: "modules_to_save" in name)
        adapted.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
    loaded, _ = load(tmp_path / "int4", dtype="float32", adapter=tmp_path / "norms")
    name = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(loaded.state_dict()[name], model.state_dict()[name])
    with pytest.raises(
        CheckpointError, match=r"cannot be merged into .*gate_proj.*stores quantized"
    ):
        load(tmp_path / "int4", dtype="float32", adapter=tmp_path / "layers")


def test_unmerged_adapters_are_refused(untied: tuple[Path, Qwen2VL], tmp_path: Path) -> None:
    folder, model = untied
    adapted = peft_model(model, modules_to_save=["merger"])
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    text = r"holds weights in full \(6 tensors of visual\.merger\.\*\), which .* only be merged"
    with pytest.raises(CheckpointError, match=text):
        LLM(folder, dtype="float32", adapters={"a": tmp_path / "adapter"})
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
