"""Adapters that PEFT has made and saved: merged here, and by PEFT, to the same bits."""

from __future__ import annotations

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
from tests.parity.oracle import (
    ask,
    ask_reference,
    random_model,
    reference_name,
    relative_error,
    twin,
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


def adapt(model: Qwen2VL, folder: Path, **options: Any) -> Any:
    """Let PEFT adapt the twin of a model, at random, and save the adapter."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options)
    adapted = get_peft_model(twin(model), config).eval()
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted


def merged(model: Qwen2VL, folder: Path, **options: Any) -> dict[str, Tensor]:
    """The same, merged by PEFT."""
    return adapt(model, folder, **options).merge_and_unload().state_dict()


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
    ],
)
def test_merged_weights_equal_pefts(
    base: tuple[Path, Qwen2VL], tmp_path: Path, options: dict[str, Any]
) -> None:
    folder, model = base
    want = merged(model, tmp_path / "adapter", **options)
    got, _ = load(folder, dtype="float32", adapter=tmp_path / "adapter")
    changed = 0
    for name, weight in got.state_dict().items():
        assert torch.equal(weight, want[reference_name(name)]), name
        changed += not torch.equal(weight, model.state_dict()[name])
    assert changed >= 2


def test_the_older_key_layout_gives_the_same(base: tuple[Path, Qwen2VL], tmp_path: Path) -> None:
    folder, model = base
    adapt(model, tmp_path / "new", target_modules=ADAPTED)
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


def test_logits_are_those_of_pefts_unmerged_model(
    base: tuple[Path, Qwen2VL], tmp_path: Path
) -> None:
    folder, model = base
    reference = adapt(model, tmp_path / "adapter", target_modules=ADAPTED)
    ours, _ = load(folder, dtype="float32", adapter=tmp_path / "adapter")
    question = prompt([3, image(4, 6), 4, video(2, 4, 4), 5], model.config)
    patches_NP = patches(question, model.config)
    with torch.no_grad():
        want_TV = ask_reference(reference, question, patches_NP, model.config)
        plain_TV = ask(model, question, patches_NP)
        assert relative_error(ask(ours, question, patches_NP), want_TV) < 1e-5
    assert relative_error(plain_TV, want_TV) > 1e-2


def test_what_peft_saves_of_dora_is_refused(base: tuple[Path, Qwen2VL], tmp_path: Path) -> None:
    folder, model = base
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(CheckpointError, match="uses use_dora True, which is not supported"):
        load(folder, adapter=tmp_path / "adapter")


def test_an_llm_takes_an_adapter(base: tuple[Path, Qwen2VL], tmp_path: Path) -> None:
    folder, model = base
    want = merged(model, tmp_path / "adapter", target_modules=["q_proj"])
    llm = LLM(folder, dtype="float32", adapter=str(tmp_path / "adapter"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(llm.model.state_dict()[name], want[reference_name(name)])
