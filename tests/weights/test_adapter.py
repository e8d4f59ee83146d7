"""Adapter folders: config and tensors are read and written, pickles are never loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen2vl.errors import CheckpointError
from qwen2vl.weights import adapter, read_adapter, save_adapter

KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({KEY: torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_config_and_tensors_are_read(folder: Path) -> None:
    settings, tensors = read_adapter(str(folder))
    assert settings == {"peft_type": "LORA", "r": 2}
    assert list(tensors) == [KEY]
    assert torch.equal(tensors[KEY], torch.ones(2, 3))


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter '.*/none': no such folder; give the"):
        read_adapter(tmp_path / "none")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} missing; give the folder that PEFT saved"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["model-000030", "step-000030"])
def test_the_adapter_beside_the_model_of_a_run_is_named(tmp_path: Path, name: str) -> None:
    for folder in (name, "adapter-000030", "adapter-000020"):
        (tmp_path / folder).mkdir()
        if folder != name:
            (tmp_path / folder / "adapter_config.json").touch()
    text = f"{name}: is no adapter; give the one of the same step, {tmp_path}/adapter-000030"
    with pytest.raises(CheckpointError, match=text):
        read_adapter(tmp_path / name)


def test_pickles_are_never_loaded(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pickle.*never loaded; convert.*'adapter_model.safe"
    ):
        read_adapter(folder)


def test_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: "):
        read_adapter(folder)


def test_invalid_json_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not valid JSON"):
        read_adapter(folder)


def test_saved_adapter_is_read_back(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2}, {KEY: torch.ones(3, 2).T})
    settings, tensors = read_adapter(tmp_path / "a")
    assert settings == {"peft_type": "LORA", "r": 2}
    assert torch.equal(tensors[KEY], torch.ones(2, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_existing_folder_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already and is not an empty folder"):
        save_adapter(folder, {}, {KEY: torch.zeros(2, 3)})
    assert torch.equal(read_adapter(folder)[1][KEY], torch.ones(2, 3))


def test_full_disk_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_disk_full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter, "save_file", raise_disk_full)
    with pytest.raises(CheckpointError, match="cannot be saved: No space left on device; free"):
        save_adapter(tmp_path / "a", {}, {KEY: torch.zeros(2, 3)})
    assert not list(tmp_path.iterdir())
