"""Saved models load to the bit; a crash or a full disk leaves no partial folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen2vl.errors import CheckpointError
from qwen2vl.processor.image import PixelLimits
from qwen2vl.weights import (
    GenerationDefaults,
    check_state_dict,
    open_tensors,
    read_config,
    read_generation_defaults,
    read_preprocessor_config,
    save,
)
from qwen2vl.weights.header import read_header
from tests.folders import PIXELS, write_tiny
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer_dir


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
    check_state_dict(tensors, config)
    assert len(list(folder.glob("*.safetensors"))) == 1 or max_shard_bytes == 50_000
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name], tensor.to(dtype))
        assert tensors[name].dtype == dtype
    assert read_generation_defaults(folder) == generation
    assert PixelLimits.from_dict(read_preprocessor_config(folder)) == PIXELS
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_shards_have_the_official_layout(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_files_equal_those_of_safetensors(
    tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Tensors arrive in any order, on meta before; every file is what the library would write."""
    model = tiny_model(config=tiny_config(tie_word_embeddings=False))
    state = model.state_dict()
    names = sorted(state, key=lambda name: name[::-1])
    save.stream_folder(
        tmp_path / "model",
        config=model.config,
        layout={name: tensor.to("meta") for name, tensor in state.items()},
        tensors=((name, state[name]) for name in names),
        tokenizer_folder=tiny_tokenizer_dir(),
        pixels=PIXELS,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 50_000)
    for file in files:
        shard = {name: state[name].to(dtype) for name in read_header(file)}
        save_file(shard, tmp_path / "other.safetensors", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    assert set(open_tensors(tmp_path / "model")) == set(state)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CheckpointError("damaged source")])
def test_a_failure_while_tensors_are_made_leaves_no_files(
    tmp_path: Path, error: BaseException
) -> None:
    model = tiny_model()

    def first_then_fail() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter(model.state_dict().items()))
        raise error

    with pytest.raises(type(error)):
        save.stream_folder(
            tmp_path / "model",
            config=model.config,
            layout=model.state_dict(),
            tensors=first_then_fail(),
            tokenizer_folder=tiny_tokenizer_dir(),
            pixels=PIXELS,
        )
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(CheckpointError, match=r"take 0.00 GB, but 0.00 GB are free there; nothing"):
        write_tiny(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_folder_has_all_files(tmp_path: Path) -> None:
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


def test_weights_have_the_folders_read_permissions(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "model").stat().st_mode & 0o666}


def test_generation_config_always_has_eos_token_id(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    defaults = read_generation_defaults(tmp_path / "model")
    assert defaults == GenerationDefaults(eos_token_ids=(model.config.eos_token_id,))


def test_empty_folder_may_be_the_target(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_tiny(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_existing_files_are_not_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    existing_file = target / "thesis.txt" if kind == "folder" else target
    existing_file.parent.mkdir(exist_ok=True)
    existing_file.write_text("precious")
    with pytest.raises(CheckpointError, match="exists already and is not an empty folder"):
        write_tiny(target)
    assert existing_file.read_text() == "precious"


def test_partial_folder_of_a_killed_run_is_replaced(tmp_path: Path) -> None:
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"half")
    write_tiny(tmp_path / "model")
    assert not partial.exists()
    assert not list((tmp_path / "model").glob("model-*"))


@pytest.mark.parametrize(
    ("module", "at"), [(save, "_bytes_of"), (save, "_write_json"), (os, "fsync")]
)
def test_full_disk_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, at: str
) -> None:
    def raise_disk_full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, at, raise_disk_full)
    with pytest.raises(CheckpointError, match="cannot be saved: No space left on device; nothing"):
        write_tiny(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_saving_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
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


def test_missing_parent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*; make it first"):
        write_tiny(tmp_path / "no" / "such" / "model")


def test_saving_over_the_loaded_folder_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    with pytest.raises(CheckpointError, match="exists already"):
        write_tiny(tmp_path / "model")
