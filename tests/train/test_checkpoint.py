"""Checkpoints: complete or absent, limited in number; foreign and damaged ones are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.recipes import tiny
from qwen2vl.train import checkpoint
from qwen2vl.train.checkpoint import CheckpointSaver, HuggingFaceStorageWriter
from qwen2vl.train.config import dump, override

SINGLE_PROCESS = DistributedContext(torch.device("cpu"))
METADATA: dict[str, Any] = {"config": json.loads(dump(tiny.recipe()))}


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    """Return a weight, an optimizer state, a counter and an RNG state, as of a run."""
    return {
        "a.weight": torch.full((7, 3), value),
        "a.weight|exp_avg": torch.full((7, 3), -value),
        "a.weight|step": torch.tensor(value),
        "random|0|cpu": torch.get_rng_state(),
    }


def save_steps(folder: Path, *steps: int, save_total_limit: int = 2) -> None:
    saver = CheckpointSaver(folder, save_total_limit, SINGLE_PROCESS)
    for step in steps:
        saver.save(step, tensors(step), METADATA)
    saver.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load(path: Path) -> dict[str, Tensor]:
    tensors_found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    checkpoint.load_tensors(path, tensors_found, SINGLE_PROCESS)
    return tensors_found


def test_saved_tensors_are_loaded(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    path = tmp_path / "step-000003"
    checkpoint.verify(path, SINGLE_PROCESS)
    assert checkpoint.tensor_shapes(path) == {name: t.shape for name, t in tensors().items()}
    for name, tensor in load(path).items():
        assert torch.equal(tensor, tensors(3.0)[name]), name


def test_a_checkpoint_has_no_pickle_file(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    assert {p.suffix for p in (tmp_path / "step-000001").iterdir()} == {".safetensors", ".json"}


def test_a_save_stores_the_tensors_at_the_time_of_the_call(tmp_path: Path) -> None:
    original = tensors(1.0)
    saver = CheckpointSaver(tmp_path, 2, SINGLE_PROCESS)
    path = saver.save(1, original, METADATA)
    original["a.weight"].zero_()
    saver.close()
    assert torch.equal(load(path)["a.weight"], torch.ones(7, 3))


def test_the_last_checkpoints_are_kept_and_the_latest_is_found(tmp_path: Path) -> None:
    assert checkpoint.latest_checkpoint(tmp_path / "nowhere") is None
    save_steps(tmp_path, 10, 20, 30)
    assert names(tmp_path) == ["step-000020", "step-000030"]
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "step-000030"


def test_an_incomplete_checkpoint_does_not_count_toward_the_limit(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    next((tmp_path / "step-000020").glob("*.safetensors")).unlink()
    save_steps(tmp_path, 30)
    assert names(tmp_path) == ["step-000010", "step-000020", "step-000030"]
    save_steps(tmp_path, 40)
    assert names(tmp_path) == ["step-000030", "step-000040"]


def test_an_existing_step_is_not_saved_again(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    previous = (tmp_path / "step-000010" / "state.json").stat()
    save_steps(tmp_path, 10)
    assert (tmp_path / "step-000010" / "state.json").stat().st_mtime_ns == previous.st_mtime_ns


def test_an_unfinished_save_is_ignored_and_overwritten_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_steps(tmp_path, 20)
    partial = tmp_path / ".step-000020.partial"
    partial.mkdir()  # as left by a killed run with a larger world size
    save_file({"a.weight": torch.zeros(99, 3)}, partial / "shard-00002-model-00001.safetensors")
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "step-000010"
    save_steps(tmp_path, 20)
    assert torch.equal(load(tmp_path / "step-000020")["a.weight"], torch.full((7, 3), 20.0))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_does_not_damage_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save_steps(tmp_path, 10)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    saver = CheckpointSaver(tmp_path, 2, SINGLE_PROCESS)
    saver.save(20, tensors(), METADATA)  # returns before it is on disk
    with pytest.raises(CheckpointError, match="step-000020: cannot be saved: No space left on"):
        saver.wait()
    saver.close()
    assert names(tmp_path) == ["step-000010"]


def test_a_run_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run: cannot be made a folder: Not a directory"):
        checkpoint.create_run_folder(tmp_path / "file" / "run")


def test_another_run_is_refused_with_the_differing_fields(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    path = tmp_path / "step-000010"
    assert checkpoint.read_step(path, tiny.recipe()) == 10
    same = override(
        tiny.recipe(),
        ["num_workers=0", "output_dir=x", "gradient_accumulation_steps=2", "mesh.dp_replicate=2"],
    )
    assert checkpoint.read_step(path, same) == 10
    text = (
        r"other values of stages.0.global_batch_size \(16, now 4\), seed \(0, now 3\); "
        r"resume with the"
    )
    with pytest.raises(CheckpointError, match=text):
        checkpoint.read_step(
            path, override(tiny.recipe(), ["seed=3", "stages.0.global_batch_size=4"])
        )


CONFIG_WITH_DATA = override(tiny.recipe(), ["stages.0.data=a.jsonl"])


@pytest.mark.parametrize(
    ("item", "may_change"),
    [
        *(
            (f"data.{name}=0.5", True)
            for name in ("max_bad_fraction", "decode_timeout", "fetch_timeout")
        ),
        *(("data.max_retries=9", True), ("data.concurrency=2", True)),
        *(("data.cache_dir=elsewhere", True), ("data.frame_cache_gb=0", True)),
        *(
            ("data.global_batch_size=3", False),
            ("data.video_preset=hf", False),
            ("data.max_frames=9", False),
        ),
        *(("data.oversize=drop", False), ("data=b.jsonl", False)),
    ],
)
def test_io_options_of_the_data_may_change(tmp_path: Path, item: str, may_change: bool) -> None:
    saver = CheckpointSaver(tmp_path, 2, SINGLE_PROCESS)
    path = saver.save(10, tensors(), {"config": json.loads(dump(CONFIG_WITH_DATA))})
    saver.close()
    changed = override(CONFIG_WITH_DATA, [item])
    if may_change:
        assert checkpoint.read_step(path, changed) == 10
        return
    name = item.partition("=")[0].replace("data", r"stages.0.data(.sources.0.path)?", 1)
    with pytest.raises(CheckpointError, match=rf"other values of {name} \(.*, now .*\); resume"):
        checkpoint.read_step(path, changed)


@pytest.mark.parametrize(
    "item", ["model.text.rms_norm_eps=1e-5", "min_pixels=784", "max_pixels=784000", "init=x"]
)
def test_fields_that_determine_the_result_must_not_change(tmp_path: Path, item: str) -> None:
    save_steps(tmp_path, 10)
    name = item.partition("=")[0].replace("model.text.", "model.")  # as in config.json
    with pytest.raises(CheckpointError, match=rf"other values of {name} \(.*, now .*\); resume"):
        checkpoint.read_step(tmp_path / "step-000010", override(tiny.recipe(), [item]))


def test_a_field_missing_in_an_older_checkpoint_is_not_compared(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    state = tmp_path / "step-000010" / "state.json"
    older = json.loads(state.read_text())
    for part in (older["config"]["optim"], older["config"]["stages"][0]):
        part.popitem()
    state.write_text(json.dumps(older))
    assert checkpoint.read_step(state.parent, tiny.recipe()) == 10


@pytest.mark.parametrize(
    "damage", ["", "{}", json.dumps({"step": "x", "config": {}}), '{"step":1,"config":3}']
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, damage: str) -> None:
    save_steps(tmp_path, 10)
    (tmp_path / "step-000010" / "state.json").write_text(damage)
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        checkpoint.read_step(tmp_path / "step-000010", tiny.recipe())


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_tensor_files_are_refused(tmp_path: Path, damage: str) -> None:
    save_steps(tmp_path, 10)
    path = next((tmp_path / "step-000010").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-100] if damage == "cut" else content)
    if damage == "gone":
        path.unlink()
    with pytest.raises(CheckpointError, match=r"step-000010: damaged checkpoint \(shard-00001"):
        checkpoint.verify(tmp_path / "step-000010", SINGLE_PROCESS)


@pytest.mark.parametrize(
    "requested",
    [{"b.weight": torch.zeros(2)}, {"a.weight": torch.zeros(8, 3)}],
    ids=["name", "shape"],
)
def test_tensors_of_another_model_are_refused(tmp_path: Path, requested: dict[str, Tensor]) -> None:
    save_steps(tmp_path, 10)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        checkpoint.load_tensors(tmp_path / "step-000010", requested, SINGLE_PROCESS)


def test_checkpoints_without_a_file_list_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "step-000010"
    path.mkdir()
    original = tensors(5.0)
    save_file({"a.weight": original.pop("a.weight")}, path / "model.safetensors")
    save_file(original, path / "optimizer.safetensors")
    (path / "state.json").write_text(json.dumps({"step": 10, **METADATA}))
    checkpoint.verify(path, SINGLE_PROCESS)
    assert checkpoint.read_step(path, tiny.recipe()) == 10
    assert torch.equal(load(path)["a.weight"], torch.full((7, 3), 5.0))


def test_each_rank_has_its_own_safetensors_file(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (path,) = (tmp_path / "step-000001").glob("*.safetensors")
    assert path.name.startswith("shard-00001-")
    assert torch.equal(load_file(path)["a.weight"], torch.ones(7, 3))
