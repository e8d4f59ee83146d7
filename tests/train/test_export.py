"""Export of a checkpoint to a model folder; see also test_adapter, and the command in tests/cli."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2vl.errors import CheckpointError
from qwen2vl.loading import load
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.train.checkpoint import CheckpointSaver
from qwen2vl.train.export import export_metadata, export_model
from tests.tiny import tiny_model, tiny_processor, tiny_tokenizer_dir

MODEL = tiny_model()


def metadata(run_folder: Path) -> dict[str, Any]:
    return {"config": {}, **export_metadata(tiny_processor(), tiny_tokenizer_dir(), run_folder)}


def save_checkpoints(run_folder: Path, *steps: int) -> Path:
    saver = CheckpointSaver(run_folder, 9, DistributedContext(torch.device("cpu")))
    for step in steps:
        path = saver.save(
            step, {n: t + step for n, t in MODEL.state_dict().items()}, metadata(run_folder)
        )
    saver.close()
    return path


def test_export_metadata_has_config_pixel_limits_and_tokenizer(tmp_path: Path) -> None:
    exported_metadata = metadata(tmp_path)
    assert exported_metadata["tokenizer"] == str(tiny_tokenizer_dir().resolve())
    assert exported_metadata["model"]["torch_dtype"] == "float32"
    assert exported_metadata["preprocessor"]["max_pixels"] == 64 * 28 * 28
    assert json.loads(json.dumps(exported_metadata)) == exported_metadata
    own_tokenizer = tmp_path / "run" / "tokenizer"
    own_tokenizer.mkdir(parents=True)
    # A relative path, since the run's folder may be moved.
    assert (
        export_metadata(tiny_processor(), own_tokenizer, tmp_path / "run")["tokenizer"]
        == "tokenizer"
    )


@pytest.mark.parametrize(("source", "step"), [("run", 4), ("run/step-000002", 2)])
def test_the_last_or_any_checkpoint_of_a_run_is_exported(
    tmp_path: Path, source: str, step: int
) -> None:
    save_checkpoints(tmp_path / "run", 2, 4)
    assert export_model(tmp_path / source, tmp_path / "new") == tmp_path / f"run/step-{step:06d}"
    model, processor = load(tmp_path / "new", dtype="float32")
    assert processor.pixels == tiny_processor().pixels
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (MODEL.state_dict()[name] + step).bfloat16().float()), name


def test_a_moved_run_uses_its_own_tokenizer(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "tokenizer").symlink_to(tiny_tokenizer_dir())
    path = save_checkpoints(run_folder, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "tokenizer": "tokenizer"}))
    run_folder.rename(tmp_path / "moved")
    export_model(tmp_path / "moved", tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").is_file()


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run's folder with one"):
        export_model(tmp_path, tmp_path / "new")
    path = save_checkpoints(tmp_path / "run", 1)
    state = json.loads((path / "state.json").read_text())
    del state["tokenizer"]
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="made by an older version, which exported at the"):
        export_model(path, tmp_path / "new")
    next(path.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        export_model(path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
