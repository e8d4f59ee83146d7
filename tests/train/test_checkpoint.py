"""Checkpoints: whole or not there, the last few stay, foreign and damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.parallel.mesh import Ranks
from qwen2vl.recipes import tiny
from qwen2vl.train import checkpoint
from qwen2vl.train.checkpoint import HuggingFaceStorageWriter, Saver
from qwen2vl.train.config import dump, override

ONE = Ranks(torch.device("cpu"))
FACTS: dict[str, Any] = {"config": json.loads(dump(tiny.recipe()))}


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    """Weights, a moment, a counter and a random state, as a run has them."""
    return {
        "a.weight": torch.full((7, 3), value),
        "a.weight|exp_avg": torch.full((7, 3), -value),
        "a.weight|step": torch.tensor(value),
        "random|0|cpu": torch.get_rng_state(),
    }


def saved(folder: Path, *steps: int, keep: int = 2) -> None:
    saver = Saver(folder, keep, ONE)
    for step in steps:
        saver.save(step, tensors(step), FACTS)
    saver.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def loaded(path: Path) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    checkpoint.read(path, found, ONE)
    return found


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    path = tmp_path / "step-000003"
    checkpoint.verify(path, ONE)
    assert checkpoint.shapes(path) == {name: t.shape for name, t in tensors().items()}
    for name, tensor in loaded(path).items():
        assert torch.equal(tensor, tensors(3.0)[name]), name


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert {p.suffix for p in (tmp_path / "step-000001").iterdir()} == {".safetensors", ".json"}


def test_a_save_keeps_what_the_tensors_were_when_it_was_asked_for(tmp_path: Path) -> None:
    given = tensors(1.0)
    saver = Saver(tmp_path, 2, ONE)
    path = saver.save(1, given, FACTS)
    given["a.weight"].zero_()
    saver.close()
    assert torch.equal(loaded(path)["a.weight"], torch.ones(7, 3))


def test_the_last_ones_stay_and_the_newest_is_found(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None
    saved(tmp_path, 10, 20, 30)
    assert names(tmp_path) == ["step-000020", "step-000030"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000030"


def test_a_checkpoint_that_lost_a_file_does_not_count_among_the_last(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    next((tmp_path / "step-000020").glob("*.safetensors")).unlink()
    saved(tmp_path, 30)
    assert names(tmp_path) == ["step-000010", "step-000020", "step-000030"]
    saved(tmp_path, 40)
    assert names(tmp_path) == ["step-000030", "step-000040"]


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    before = (tmp_path / "step-000010" / "state.json").stat()
    saved(tmp_path, 10)
    assert (tmp_path / "step-000010" / "state.json").stat().st_mtime_ns == before.st_mtime_ns


def test_an_unfinished_save_is_not_seen_and_leaves_nothing_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 20)
    aside = tmp_path / ".step-000020.partial"
    # As a run of more ranks would have left it.
    save_file({"a.weight": torch.zeros(99, 3)}, aside / "shard-00002-model-00001.safetensors")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000010"
    saved(tmp_path, 20)
    assert torch.equal(loaded(tmp_path / "step-000020")["a.weight"], torch.full((7, 3), 20.0))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    saved(tmp_path, 10)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    saver = Saver(tmp_path, 2, ONE)
    saver.save(20, tensors(), FACTS)  # it returns before it is on disk
    with pytest.raises(CheckpointError, match="step-000020: cannot be saved: No space left on"):
        saver.wait()
    saver.close()
    assert names(tmp_path) == ["step-000010"]


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run: cannot be made a folder: Not a directory"):
        checkpoint.make_folder(tmp_path / "file" / "run")


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    path = tmp_path / "step-000010"
    assert checkpoint.read_step(path, tiny.recipe()) == 10
    same = override(tiny.recipe(), ["workers=0", "out=x", "accumulate=2", "mesh.replicate=2"])
    assert checkpoint.read_step(path, same) == 10
    told = r"other values of stages.0.examples \(16, now 4\), seed \(0, now 3\); resume with the"
    with pytest.raises(CheckpointError, match=told):
        checkpoint.read_step(path, override(tiny.recipe(), ["seed=3", "stages.0.examples=4"]))


READING = override(tiny.recipe(), ["stages.0.data=a.jsonl"])


@pytest.mark.parametrize(
    ("word", "may_change"),
    [
        *((f"data.{name}=0.5", True) for name in ("max_bad", "decode_seconds", "fetch_seconds")),
        *(("data.retries=9", True), ("data.concurrency=2", True)),
        *(("data.cache=elsewhere", True), ("data.cache_gb=0", True)),
        *(("data.bins=3", False), ("data.video_preset=hf", False), ("data.max_frames=9", False)),
        *(("data.oversize=drop", False), ("data=b.jsonl", False)),
    ],
)
def test_how_data_are_fetched_and_kept_may_change(
    tmp_path: Path, word: str, may_change: bool
) -> None:
    saver = Saver(tmp_path, 2, ONE)
    path = saver.save(10, tensors(), {"config": json.loads(dump(READING))})
    saver.close()
    again = override(READING, [word])
    if may_change:
        assert checkpoint.read_step(path, again) == 10
        return
    name = word.partition("=")[0].replace("data", r"stages.0.data(.sources.0.path)?", 1)
    with pytest.raises(CheckpointError, match=rf"other values of {name} \(.*, now .*\); resume"):
        checkpoint.read_step(path, again)


@pytest.mark.parametrize(
    "word", ["model.text.rms_norm_eps=1e-5", "min_pixels=784", "max_pixels=784000", "init=x"]
)
def test_what_decides_the_bits_must_stay(tmp_path: Path, word: str) -> None:
    saved(tmp_path, 10)
    name = word.partition("=")[0].replace("model.text.", "model.")  # as in config.json
    with pytest.raises(CheckpointError, match=rf"other values of {name} \(.*, now .*\); resume"):
        checkpoint.read_step(tmp_path / "step-000010", override(tiny.recipe(), [word]))


def test_a_checkpoint_from_before_a_field_existed_is_of_the_same_run(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    state = tmp_path / "step-000010" / "state.json"
    old = json.loads(state.read_text())
    for part in (old["config"]["optim"], old["config"]["stages"][0]):
        part.popitem()
    state.write_text(json.dumps(old))
    assert checkpoint.read_step(state.parent, tiny.recipe()) == 10


@pytest.mark.parametrize(
    "damage", ["", "{}", json.dumps({"step": "x", "config": {}}), '{"step":1,"config":3}']
)
def test_a_damaged_state_is_refused(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 10)
    (tmp_path / "step-000010" / "state.json").write_text(damage)
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        checkpoint.read_step(tmp_path / "step-000010", tiny.recipe())


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_weights_that_are_not_what_was_written_are_refused(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 10)
    path = next((tmp_path / "step-000010").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-100] if damage == "cut" else content)
    if damage == "gone":
        path.unlink()
    with pytest.raises(CheckpointError, match=r"step-000010: damaged checkpoint \(shard-00001"):
        checkpoint.verify(tmp_path / "step-000010", ONE)


@pytest.mark.parametrize(
    "wanted", [{"b.weight": torch.zeros(2)}, {"a.weight": torch.zeros(8, 3)}], ids=["name", "shape"]
)
def test_tensors_of_another_model_are_refused(tmp_path: Path, wanted: dict[str, Tensor]) -> None:
    saved(tmp_path, 10)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        checkpoint.read(tmp_path / "step-000010", wanted, ONE)


def test_files_of_before_the_manifest_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "step-000010"
    path.mkdir()
    given = tensors(5.0)
    save_file({"a.weight": given.pop("a.weight")}, path / "model.safetensors")
    save_file(given, path / "optimizer.safetensors")
    (path / "state.json").write_text(json.dumps({"step": 10, **FACTS}))
    checkpoint.verify(path, ONE)
    assert checkpoint.read_step(path, tiny.recipe()) == 10
    assert torch.equal(loaded(path)["a.weight"], torch.full((7, 3), 5.0))


def test_every_rank_has_a_file_of_its_own_that_safetensors_opens(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (path,) = (tmp_path / "step-000001").glob("*.safetensors")
    assert path.name.startswith("shard-00001-")
    assert torch.equal(load_file(path)["a.weight"], torch.ones(7, 3))
