"""Tensor names and shapes must be exactly the model's; mismatches are in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen2vl.config import PRESETS, Qwen2VLConfig
from qwen2vl.errors import CheckpointError
from qwen2vl.weights import check_state_dict, expected_shapes, nonfinite_tensors, open_tensors
from qwen2vl.weights.state_dict import EMBED_TOKENS_WEIGHT, LM_HEAD_WEIGHT, PATCH_EMBED_WEIGHT
from tests.tiny import tiny_config


def random_weights(config: Qwen2VLConfig) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in expected_shapes(config).items()}


def save_and_check(folder: Path, tensors: dict[str, Tensor], config: Qwen2VLConfig) -> None:
    save_file(tensors, folder / "model.safetensors")
    check_state_dict(open_tensors(folder), config)


@pytest.mark.parametrize(
    ("size", "parameters", "tensors"),
    [("2B", 2_208_985_600, 729), ("7B", 8_291_375_616, 730), ("72B", 73_405_560_320, 1354)],
)
def test_official_sizes(size: str, parameters: int, tensors: int) -> None:
    shapes = expected_shapes(PRESETS[size])
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    assert len(shapes) == tensors
    assert (LM_HEAD_WEIGHT in shapes) == (size != "2B")
    assert shapes[PATCH_EMBED_WEIGHT] == (1280, 3, 2, 14, 14)


def test_exact_state_dict_is_accepted(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=False)
    save_and_check(tmp_path, random_weights(config), config)


def test_all_mismatches_are_in_one_message(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=False)
    tensors = random_weights(config)
    del tensors["visual.blocks.1.attn.qkv.bias"], tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(65)
    with pytest.raises(CheckpointError) as caught:
        save_and_check(tmp_path, tensors, config)
    assert str(caught.value) == (
        f"{tmp_path}: the tensors do not fit config.json: "
        "2 missing: visual.blocks.1.attn.qkv.bias, model.layers.0.mlp.up_proj.weight; "
        "1 not of this model: model.layers.7.mlp.up_proj.weight; "
        "1 misshapen: model.norm.weight is [65], config.json asks for [64]"
    )


def test_long_lists_are_shortened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"58 missing: .* and 50 more; 1 not of this model"):
        save_and_check(
            tmp_path, {"foreign": torch.zeros(1)}, tiny_config(tie_word_embeddings=False)
        )


def test_flat_patch_embedding_is_accepted(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_weights(config)
    tensors[PATCH_EMBED_WEIGHT] = tensors[PATCH_EMBED_WEIGHT].flatten(1)
    save_and_check(tmp_path, tensors, config)
    tensors[PATCH_EMBED_WEIGHT] = tensors[PATCH_EMBED_WEIGHT][:, :-1].clone()
    with pytest.raises(CheckpointError, match=r"proj.weight is \[32, 1175\], config.json asks"):
        save_and_check(tmp_path, tensors, config)


def test_copy_of_a_tied_head_is_accepted(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_weights(config)
    save_and_check(
        tmp_path, tensors | {LM_HEAD_WEIGHT: tensors[EMBED_TOKENS_WEIGHT].clone()}, config
    )


def test_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_weights(config)
    other = tensors[EMBED_TOKENS_WEIGHT].clone()
    other[-1, -1] += 1
    with pytest.raises(CheckpointError, match=r"ties the head .* differs from it; set tie_word_em"):
        save_and_check(tmp_path, tensors | {LM_HEAD_WEIGHT: other}, config)
    del tensors[EMBED_TOKENS_WEIGHT]
    with pytest.raises(CheckpointError, match=r"fit config.json: 1 missing: model.embed_tokens.we"):
        save_and_check(tmp_path, tensors | {LM_HEAD_WEIGHT: other}, config)


def test_missing_head_hints_at_tie_word_embeddings(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head.weight \(a model without .*2B"):
        save_and_check(
            tmp_path, random_weights(tiny_config()), tiny_config(tie_word_embeddings=False)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nonfinite_tensors_are_named(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: torch.randn(4, 5).to(dtype) for name in ("a", "b", "c", "d")}
    tensors["b"][1, 2] = float("nan")
    tensors["d"][3, 4] = -float("inf")
    tensors["empty"] = torch.zeros(0, dtype=dtype)
    tensors["largest"] = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    assert sorted(nonfinite_tensors(open_tensors(tmp_path))) == ["b", "d"]
