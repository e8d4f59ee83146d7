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


def test_a_file_of_an_adapter_is_no_adapter(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"is a file; give its folder, '{folder}'"):
        read_adapter(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_model_is_no_adapter(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(
        CheckpointError, match=r"is a model, no adapter; give it as the model \(--m"
    ):
        read_adapter(tmp_path)


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{{ messages }}"),
        ("chat_template.json", '{"chat_template": "{{ messages }}"}'),
        ("tokenizer_config.json", '{"chat_template": "{{ messages }}"}'),
    ],
)
def test_the_chat_template_of_an_adapter_is_logged(
    folder: Path, name: str, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "qwen2vl")
    (folder / name).write_text(content, encoding="utf-8")
    read_adapter(folder)
    assert f"{name}: its chat template is not the official one; not used" in caplog.text


# Files beside the adapter's own ---------------------------------------------------------------


def test_files_beside_the_adapter_are_opened(folder: Path) -> None:
    save_file({"visual.merger.ln_q.weight": torch.zeros(4)}, folder / "vit.safetensors")
    _, tensors = read_adapter(folder)
    assert set(tensors) == {KEY, "visual.merger.ln_q.weight"}
    assert tensors.path("visual.merger.ln_q.weight").name == "vit.safetensors"


def test_shards_are_one_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(
        folder / "adapter_model-00002-of-00002.safetensors"
    )
    with pytest.raises(CheckpointError, match="adapter_model has 1 shards of 2: adapter_model-0"):
        read_adapter(folder)
    other = KEY.replace("lora_A", "lora_B")
    save_file({other: torch.ones(3, 2)}, folder / "adapter_model-00001-of-00002.safetensors")
    assert set(read_adapter(folder)[1]) == {KEY, other}


@pytest.mark.parametrize(
    "name",
    [
        "non_lora_state_dict.bin",
        "non_lora_trainables.bin",
        "mm_projector.bin",
        "pytorch_model.bin",
        "merger.pt",
    ],
)
def test_pickles_beside_the_adapter_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x02.")
    with pytest.raises(
        CheckpointError, match=f"{name} may hold weights that were trained"
    ) as caught:
        read_adapter(folder)
    assert f"{Path(name).stem}.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_converted_pickle_is_left_alone(folder: Path) -> None:
    for name in ("non_lora_state_dict.bin", "adapter_model.bin"):
        (folder / name).write_bytes(b"\x80\x02.")
    save_file({"visual.x": torch.zeros(4)}, folder / "non_lora_state_dict.safetensors")
    assert set(read_adapter(folder)[1]) == {KEY, "visual.x"}


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "random_states_0.pkl",
        "training_args.bin",
        "trainer_state.json",
        "zero_to_fp32.py",
        "additional_config.json",
        "global_step100/mp_rank_00_model_states.pt",
        "checkpoint-10/adapter_model.bin",
        "latest",
    ],
)
def test_state_of_the_trainer_is_left_alone(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x80\x02.")
    assert list(read_adapter(folder)[1]) == [KEY]


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin", "v_head.bin"])
def test_value_heads_are_left_out_with_a_note(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / name).write_bytes(b"\x80\x02.")
    assert list(read_adapter(folder)[1]) == [KEY]
    assert f"{name} is not read: generation has no value head" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_whole_model_beside_the_adapter_is_refused(folder: Path, name: str) -> None:
    save_file({"visual.x": torch.zeros(4)}, folder / name)
    with pytest.raises(
        CheckpointError, match=f"{name}, a whole model, is beside the adapter; move"
    ):
        read_adapter(folder)


def test_files_that_contradict_each_other_are_refused(folder: Path) -> None:
    save_file({KEY: torch.ones(2, 3)}, folder / "a.safetensors")
    assert list(read_adapter(folder)[1]) == [KEY]
    save_file({KEY: torch.zeros(2, 3)}, folder / "b.safetensors")
    text = r"lora_A\.weight is in adapter_model\.safetensors and differently in b\.safetensors"
    with pytest.raises(CheckpointError, match=text):
        read_adapter(folder)


def test_a_name_in_both_key_layouts_of_one_file_is_refused(folder: Path) -> None:
    names = ("visual.merger.mlp.2.bias", "model.visual.merger.mlp.2.bias")
    save_file({name: torch.ones(2) for name in names}, folder / "vit.safetensors")
    text = r"visual\.merger\.mlp\.2\.bias is twice in vit\.safetensors, in both key layouts; save"
    with pytest.raises(CheckpointError, match=text):
        read_adapter(folder)
