"""Adapters saved by PEFT, merged by this library and by PEFT, are identical to the bit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen2vl.engine import LLM
from qwen2vl.errors import CheckpointError
from qwen2vl.loading import load
from qwen2vl.model import Qwen2VL
from tests.folders import write_tiny
from tests.parity.reference import (
    compute_logits,
    compute_reference_logits,
    random_model,
    reference_name,
    relative_error,
    to_reference,
)
from tests.prompts import image, patches, prompt, video
from tests.tiny import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ADAPTED = ["q_proj", "v_proj", "down_proj", "qkv", "attn.proj", "fc2", "merger.mlp.2", "lm_head"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen2VL]:
    folder = tmp_path_factory.mktemp("base") / "model"
    model = random_model(tiny_config(tie_word_embeddings=False))
    return folder, write_tiny(folder, model=model)


def save_peft_adapter(model: Qwen2VL, folder: Path, **options: Any) -> Any:
    """Adapt the transformers copy of a model with random LoRA factors, and save the adapter."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options)
    adapted = get_peft_model(to_reference(model), config).eval()
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted


def merge_with_peft(model: Qwen2VL, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Save an adapter as `save_peft_adapter`, and return the state dict merged by PEFT."""
    return save_peft_adapter(model, folder, **options).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ADAPTED},
        {"target_modules": ADAPTED, "use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1.*(q_proj|o_proj)"},
        {
            "target_modules": ["q_proj", "qkv"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 7},
            "alpha_pattern": {"qkv": 3},
        },
        {"target_modules": [*ADAPTED, "query_key_value"]},
        {"target_modules": "all-linear", "exclude_modules": r".*visual.*"},
        {"target_modules": ["q_proj", "qkv"], "layers_to_transform": [1]},
    ],
)
def test_merged_weights_equal_those_of_peft(
    base: tuple[Path, Qwen2VL], tmp_path: Path, options: dict[str, Any]
) -> None:
    folder, model = base
    expected = merge_with_peft(model, tmp_path / "adapter", **options)
    got, _ = load(folder, dtype="float32", adapter=tmp_path / "adapter")
    num_changed = 0
    for name, weight in got.state_dict().items():
        assert torch.equal(weight, expected[reference_name(name)]), name
        num_changed += not torch.equal(weight, model.state_dict()[name])
    assert num_changed >= 2


def test_older_key_layout_gives_the_same(base: tuple[Path, Qwen2VL], tmp_path: Path) -> None:
    folder, model = base
    save_peft_adapter(model, tmp_path / "new", target_modules=ADAPTED)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    path = tmp_path / "old" / "adapter_model.safetensors"
    tensors = {
        key.replace("model.model.language_model.", "model.model.").replace(
            "model.model.visual.", "model.visual."
        ): tensor
        for key, tensor in load_file(path).items()
    }
    assert "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight" in tensors
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    save_file(tensors, path)
    new, old = (load(folder, dtype="float32", adapter=tmp_path / n)[0] for n in ("new", "old"))
    assert all(map(torch.equal, new.state_dict().values(), old.state_dict().values()))


def test_logits_equal_those_of_the_unmerged_peft_model(
    base: tuple[Path, Qwen2VL], tmp_path: Path
) -> None:
    folder, model = base
    reference = save_peft_adapter(model, tmp_path / "adapter", target_modules=ADAPTED)
    loaded, _ = load(folder, dtype="float32", adapter=tmp_path / "adapter")
    prompt_with_media = prompt([3, image(4, 6), 4, video(2, 4, 4), 5], model.config)
    patches_NP = patches(prompt_with_media, model.config)
    with torch.no_grad():
        want_TV = compute_reference_logits(reference, prompt_with_media, patches_NP, model.config)
        plain_TV = compute_logits(model, prompt_with_media, patches_NP)
        assert relative_error(compute_logits(loaded, prompt_with_media, patches_NP), want_TV) < 1e-5
    assert relative_error(plain_TV, want_TV) > 1e-2


def test_dora_adapter_of_peft_is_refused(base: tuple[Path, Qwen2VL], tmp_path: Path) -> None:
    folder, model = base
    save_peft_adapter(model, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(CheckpointError, match="uses use_dora True, which is not supported"):
        load(folder, adapter=tmp_path / "adapter")


def test_llm_merges_an_adapter(base: tuple[Path, Qwen2VL], tmp_path: Path) -> None:
    folder, model = base
    expected = merge_with_peft(model, tmp_path / "adapter", target_modules=["q_proj"])
    llm = LLM(folder, dtype="float32", adapter=str(tmp_path / "adapter"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(llm.model.state_dict()[name], expected[reference_name(name)])


@pytest.mark.parametrize(
    ("options", "save_embeddings", "message"),
    [
        ({"trainable_token_indices": [5]}, False, "uses trainable_token_indices [5]"),
        ({"use_dora": True}, True, "uses use_dora True"),
    ],
)
def test_adapters_that_are_not_supported_are_refused_with_the_remedy(
    base: tuple[Path, Qwen2VL],
    tmp_path: Path,
    options: dict[str, Any],
    save_embeddings: bool,
    message: str,
) -> None:
    folder, model = base
    config = LoraConfig(target_modules=["q_proj"], **options)
    adapted = get_peft_model(to_reference(model), config)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=save_embeddings)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load(folder, adapter=tmp_path / "adapter", dtype="float32")
    assert str(caught.value).endswith("with PEFT and load the result")
