"""Save and resume, exactly: weights and moments in float32, and the number of the next step.

    runs/nano/
      step-000500/   model.safetensors  optimiser.safetensors  state.json
      step-001000/   ...                                       (the last `keep` stay)

A checkpoint is written aside, flushed and renamed, so that a folder with this name is whole. The
schedule is a pure function, so the step's number is all there is to say about data. No pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.train.config import TrainConfig, dump
from qwen2vl.train.optim import Optimisers

__all__ = ["latest", "make_folder", "read_step", "restore", "save"]

# What decides the bits of a run; the rest (workers, minutes, reports) may change from leg to leg.
_BINDING = ("stages", "seed", "optim", "dtype", "init", "model", "min_pixels", "max_pixels")

_NAME = re.compile(r"step-(\d{6,})")


def make_folder(folder: Path) -> None:
    """Make the folder of a run, before any work is done for it.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made a folder: {error.strerror}; give another, out=FOLDER"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder}: cannot be written to; give another folder, out=FOLDER")


def save(
    folder: Path, step: int, model: nn.Module, optimisers: Optimisers, config: TrainConfig
) -> Path:
    """Write checkpoint `step` (steps done so far) and drop all but the last `config.keep`.

    Raises:
        CheckpointError: the disk is full, or no longer writable.
    """
    target = folder / f"step-{step:06d}"
    aside = folder / f".{target.name}.partial"
    state = {"step": step, "config": json.loads(dump(config))}
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, aside / "model.safetensors"
        )
        save_file(optimisers.state(), aside / "optimiser.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in aside.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(
            f"{target}: cannot be saved: {reason}; free some space and start again: the run goes "
            "on from the checkpoint before"
        ) from error
    for old in _all(folder)[: -config.keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> Path | None:
    """Find the checkpoint with the most steps, or None."""
    found = _all(folder)
    return found[-1] if found else None


def read_step(path: Path, config: TrainConfig) -> int:
    """Read how many steps a checkpoint has done.

    Raises:
        CheckpointError: it belongs to a run that differs in what decides its bits, or is damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        step, saved = int(state["step"]), dict(state["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged checkpoint; delete it to resume before it"
        ) from error
    own = json.loads(dump(config))
    differ = [key for key in _BINDING if own[key] != saved.get(key)]
    if differ:
        raise CheckpointError(
            f"{path} was made with other values of {', '.join(differ)}; resume with the same, "
            "or begin another run with out=FOLDER"
        )
    return step


def restore(path: Path, model: nn.Module, optimisers: Optimisers | None) -> None:
    """Fill the weights and, unless a new stage begins, the optimisers' moments."""
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
        if optimisers is not None:
            optimisers.load_state(load_file(path / "optimiser.safetensors"))
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: the checkpoint does not fit this run; delete it to resume before it"
        ) from error


def _all(folder: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    named = [(m, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted((int(m[1]), p) for m, p in named)]
