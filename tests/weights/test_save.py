"""What is saved comes back to the bit; a crash or a full disk leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2vl.errors import CheckpointError
from qwen2vl.processor.image import PixelLimits
from qwen2vl.weights import (
    GenerationDefaults,
    check_fit,
    open_tensors,
    read_config,
    read_generation_defaults,
    read_preprocessor,
    save,
)
from qwen2vl.weights.header import read_header
from tests.folders import PIXELS, write_tiny
from tests.tiny import tiny_config, tiny_model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int, tied: bool) -> None:
    folder = tmp_path / "model"
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    generation = GenerationDefaults(do_sample=True, top_k=1, eos_token_ids=(260, 258))
    write_tiny(
        folder, model=model, dtype=dtype, generation=generation, max_shard_bytes=max_shard_bytes
    )
    config = read_config(folder)
    assert config == model.config
    tensors = open_tensors(folder)
    check_fit(tensors, config)
    assert len(list(folder.glob("*.safetensors"))) == 1 or max_shard_bytes == 50_000
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name], tensor.to(dtype))
        assert tensors[name].dtype == dtype
    assert read_generation_defaults(folder) == generation
    assert PixelLimits.from_dict(read_preprocessor(folder)) == PIXELS
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_shards_are_official(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    parameters = list(model.parameters())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in parameters)
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for name in shards:
        infos = read_header(tmp_path / "model" / name)
        assert sum(info.end - info.begin for info in infos.values()) <= 50_000 or len(infos) == 1
        header = (tmp_path / "model" / name).read_bytes()[8:200]
        assert b'"__metadata__":{"format":"pt"}' in header


def test_the_folder_is_whole(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names >= {
        "config.json",
        "preprocessor_config.json",
        "generation_config.json",
        "chat_template.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    }
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "Qwen2Tokenizer"
    assert "<|vision_start|>" in settings["chat_template"]


def test_who_sees_the_folder_may_read_its_weights(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    rights = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert rights == {(tmp_path / "model").stat().st_mode & 0o666}


def test_generation_config_always_names_the_end(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    defaults = read_generation_defaults(tmp_path / "model")
    assert defaults == GenerationDefaults(eos_token_ids=(model.config.eos_token_id,))


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_tiny(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    precious = target / "thesis.txt" if kind == "folder" else target
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious")
    with pytest.raises(CheckpointError, match="exists already and is not an empty folder"):
        write_tiny(target)
    assert precious.read_text() == "precious"


def test_what_a_killed_run_left_is_no_hindrance(tmp_path: Path) -> None:
    left = tmp_path / ".model.partial"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    write_tiny(tmp_path / "model")
    assert not left.exists()
    assert not list((tmp_path / "model").glob("model-*"))


@pytest.mark.parametrize("at", ["save_file", "_write_json", "_flush"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(save, at, full)
    with pytest.raises(CheckpointError, match="cannot be saved: No space left on device; nothing"):
        write_tiny(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_never_saved_without_words(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(CheckpointError, match=r"empty: no tokenizer to copy \(tokenizer.json, or"):
        save.save_folder(
            tmp_path / "model",
            config=model.config,
            state_dict=model.state_dict(),
            tokenizer_folder=tmp_path / "empty",
            pixels=PIXELS,
        )
    assert not list(tmp_path.iterdir())


def test_a_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*; make it first"):
        write_tiny(tmp_path / "no" / "such" / "model")


def test_saving_over_the_folder_one_runs_on_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    with pytest.raises(CheckpointError, match="exists already"):
        write_tiny(tmp_path / "model")
