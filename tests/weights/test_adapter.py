"""The two files of an adapter's folder: found, verified, never a pickle."""

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


def test_settings_and_tensors_under_their_own_names(folder: Path) -> None:
    settings, tensors = read_adapter(str(folder))
    assert settings == {"peft_type": "LORA", "r": 2}
    assert list(tensors) == [KEY]
    assert torch.equal(tensors[KEY], torch.ones(2, 3))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter '.*/none': no such folder; give the"):
        read_adapter(tmp_path / "none")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} missing; give the folder that PEFT saved"):
        read_adapter(folder)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pickle.*never loaded; convert.*'adapter_model.safe"
    ):
        read_adapter(folder)


def test_a_truncated_file_is_found_by_its_header(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: "):
        read_adapter(folder)


def test_settings_that_are_no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not valid JSON"):
        read_adapter(folder)


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2}, {KEY: torch.ones(3, 2).T})
    settings, tensors = read_adapter(tmp_path / "a")
    assert settings == {"peft_type": "LORA", "r": 2}
    assert torch.equal(tensors[KEY], torch.ones(2, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_what_is_there_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already and is not an empty folder"):
        save_adapter(folder, {}, {KEY: torch.zeros(2, 3)})
    assert torch.equal(read_adapter(folder)[1][KEY], torch.ones(2, 3))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter, "save_file", full)
    with pytest.raises(CheckpointError, match="cannot be saved: No space left on device; free"):
        save_adapter(tmp_path / "a", {}, {KEY: torch.zeros(2, 3)})
    assert not list(tmp_path.iterdir())
