"""Source models are read in either key layout; unsupported architectures are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.source_models import read_text_source_model, read_vision_source_model
from tests.folders import edit_json
from tests.source_models import CLIP_MODEL_CFG, DEPTH, HEADS, WIDTH, write_open_clip, write_qwen2


def edit_tower(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change, add or (None) remove tensors of the vision tower."""
    path = folder / "open_clip_model.safetensors"
    state = load_file(path) | {f"visual.{name}": tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


def test_open_clip_tower_is_read(tmp_path: Path) -> None:
    tower = write_open_clip(tmp_path)
    source = read_vision_source_model(tmp_path)
    assert (len(source.blocks), source.num_heads, source.mlp_width) == (DEPTH, HEADS, 4 * WIDTH)
    assert torch.equal(source.patch_E3YX, tower.state_dict()["conv1.weight"])
    assert source.pre_norm is not None
    assert len(source.blocks[0]) == 12


def test_tower_without_a_norm_before_its_blocks(tmp_path: Path) -> None:
    write_open_clip(tmp_path)
    edit_tower(tmp_path, **{"ln_pre.weight": None, "ln_pre.bias": None})
    assert read_vision_source_model(tmp_path).pre_norm is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"transformer.resblocks.1.ls_1.gamma": torch.ones(WIDTH)}, "1 not understood: transf"),
        ({"transformer.resblocks.0.ln_1.bias": None}, "1 missing: transformer.resblocks.0.ln_1"),
        ({"attn_pool.query": torch.ones(3)}, r"1 not understood: attn_pool\.query"),
        ({"conv1.weight": None}, r"1 missing: conv1\.weight"),
    ],
)
def test_other_vision_towers_are_refused(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    write_open_clip(tmp_path)
    edit_tower(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"not a plain CLIP ViT: {text}"):
        read_vision_source_model(tmp_path)


def test_other_activations_are_refused(tmp_path: Path) -> None:
    write_open_clip(tmp_path)
    edit_json(tmp_path / "open_clip_config.json", model_cfg=CLIP_MODEL_CFG | {"quick_gelu": False})
    with pytest.raises(CheckpointError, match="blocks compute gelu, those of Qwen2-VL quick_gelu"):
        read_vision_source_model(tmp_path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    write_open_clip(tmp_path)
    (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"a pickle, .*open_clip_model\.safetensors'"):
        read_vision_source_model(tmp_path)


def test_transformers_layout_is_read_if_open_clips_is_a_pickle(tmp_path: Path) -> None:
    write_open_clip(tmp_path)
    (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(CheckpointError, match=r"1 missing: embeddings\.patch_embedding"):
        read_vision_source_model(tmp_path)  # read in transformers' layout, which it does not have


@pytest.mark.parametrize("kind", ["siglip", "qwen2", None])
def test_other_vision_model_types_are_refused(tmp_path: Path, kind: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match="expected 'clip' or 'clip_vision_model', or"):
        read_vision_source_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl', expected 'qwen2'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is .*'yarn'"),
    ],
)
def test_other_language_models_are_refused(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    write_qwen2(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=text):
        read_text_source_model(tmp_path)


@pytest.mark.parametrize("read_source", [read_text_source_model, read_vision_source_model])
def test_missing_folder_is_refused(tmp_path: Path, read_source: Any) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        read_source(tmp_path / "none")
