"""A checkpoint becomes an ordinary folder; see also test_adapter, and the command in tests/cli."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2vl.errors import CheckpointError
from qwen2vl.loading import load
from qwen2vl.parallel.mesh import Ranks
from qwen2vl.train.checkpoint import Saver
from qwen2vl.train.export import describe, export
from tests.tiny import tiny_model, tiny_processor, tiny_tokenizer_dir

MODEL = tiny_model()


def facts(run: Path) -> dict[str, Any]:
    return {"config": {}, **describe(tiny_processor(), tiny_tokenizer_dir(), run)}


def saved(run: Path, *steps: int) -> Path:
    saver = Saver(run, 9, Ranks(torch.device("cpu")))
    for step in steps:
        path = saver.save(step, {n: t + step for n, t in MODEL.state_dict().items()}, facts(run))
    saver.close()
    return path


def test_what_is_described_is_what_an_export_needs(tmp_path: Path) -> None:
    told = facts(tmp_path)
    assert told["tokenizer"] == str(tiny_tokenizer_dir().resolve())
    assert told["model"]["torch_dtype"] == "float32"
    assert told["preprocessor"]["max_pixels"] == 64 * 28 * 28
    assert json.loads(json.dumps(told)) == told
    own = tmp_path / "run" / "tokenizer"
    own.mkdir(parents=True)
    # It moves with its run's folder.
    assert describe(tiny_processor(), own, tmp_path / "run")["tokenizer"] == "tokenizer"


@pytest.mark.parametrize(("named", "step"), [("run", 4), ("run/step-000002", 2)])
def test_a_run_s_last_checkpoint_or_any_becomes_a_model(
    tmp_path: Path, named: str, step: int
) -> None:
    saved(tmp_path / "run", 2, 4)
    assert export(tmp_path / named, tmp_path / "new") == tmp_path / f"run/step-{step:06d}"
    model, processor = load(tmp_path / "new", dtype="float32")
    assert processor.pixels == tiny_processor().pixels
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (MODEL.state_dict()[name] + step).bfloat16().float()), name


def test_a_moved_run_finds_its_own_tokenizer(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer").symlink_to(tiny_tokenizer_dir())
    path = saved(run, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "tokenizer": "tokenizer"}))
    run.rename(tmp_path / "moved")
    export(tmp_path / "moved", tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").is_file()


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run's folder with one"):
        export(tmp_path, tmp_path / "new")
    path = saved(tmp_path / "run", 1)
    state = json.loads((path / "state.json").read_text())
    del state["tokenizer"]
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="made by an older version, which exported at the"):
        export(path, tmp_path / "new")
    next(path.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        export(path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
