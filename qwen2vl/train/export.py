"""A checkpoint of a run -> an ordinary model folder, which every engine opens.

The manifest says what the model is, how large it is shown pictures, and whose tokenizer it has;
weights of any number of ranks are put together on the CPU. Of a run with an adapter the model is
the merged one, and the factors alone make a second folder. It must not know steps or optimizers.
Back up: loop.py, which ends a run with it; cli/commands/export.py does so for any step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError
from qwen2vl.lora.layers import LoraConfig
from qwen2vl.parallel.mesh import Ranks
from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.train import checkpoint
from qwen2vl.train.adapter import adapter_in, merged, room_for, write_adapter
from qwen2vl.weights.config_files import GenerationDefaults
from qwen2vl.weights.save import save_folder
from qwen2vl.weights.state_dict import expected_shapes

__all__ = ["describe", "export", "export_adapter"]

GREEDY = GenerationDefaults(do_sample=False)


def describe(processor: Processor, tokenizer: Path, run: Path) -> dict[str, Any]:
    """Say for a manifest what an export needs beside the weights."""
    tokenizer, run = tokenizer.resolve(), run.resolve()
    is_own = run in tokenizer.parents
    vision = processor.config.vision
    return {
        "model": processor.config.to_dict("float32"),
        "preprocessor": {
            **asdict(processor.pixels),
            "image_mean": list(vision.image_mean),
            "image_std": list(vision.image_std),
        },
        # A run's own tokenizer moves with its folder.
        "tokenizer": os.path.relpath(tokenizer, run) if is_own else str(tokenizer),
    }


def export(source: Path, target: Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Write the model of a checkpoint, or of a run's last one, to `target`; returns what was read.

    `facts` are those of `describe`, in place of the manifest's.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or `target` cannot be made.
    """
    path = source if (source / checkpoint.MANIFEST).is_file() else checkpoint.latest(source)
    if path is None:
        raise CheckpointError(f"{source}: neither a checkpoint nor a run's folder with one")
    one = Ranks(torch.device("cpu"))
    checkpoint.verify(path, one)
    state = facts or checkpoint.read_state(path)
    try:
        config = Qwen2VLConfig.from_dict(state["model"], state["preprocessor"])
        pixels = PixelLimits.from_dict(state["preprocessor"])
        tokenizer = path.parent / state["tokenizer"]
    except KeyError as error:
        raise CheckpointError(
            f"{path}: made by an older version, which exported at the end of a run only; resume "
            "the run with minutes=0.01 to export it"
        ) from error
    save_folder(
        target,
        config=config,
        state_dict=_weights(path, config, adapter_in(state), one),
        tokenizer_folder=tokenizer,
        pixels=pixels,
        generation=GREEDY,
    )
    return path


def export_adapter(path: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """Write the factors of a checkpoint to `target`, as PEFT does.

    Raises:
        CheckpointError: the checkpoint cannot be read, or `target` cannot be made.
    """
    adapter = adapter_in(facts)
    assert adapter is not None, "this run has no adapter"
    stored = {name: size for name, size in checkpoint.shapes(path).items() if ".lora_" in name}
    factors = room_for(stored)
    checkpoint.read(path, factors, Ranks(torch.device("cpu")))
    config = Qwen2VLConfig.from_dict(facts["model"], facts["preprocessor"])
    write_adapter(target, factors, adapter, config, base=facts["config"]["init"])


def _weights(
    path: Path, config: Qwen2VLConfig, adapter: LoraConfig | None, one: Ranks
) -> dict[str, Tensor]:
    if adapter is None:
        tensors = {name: torch.empty(shape) for name, shape in expected_shapes(config).items()}
        checkpoint.read(path, tensors, one)
        return tensors
    state = room_for(checkpoint.shapes(path))
    checkpoint.read(path, state, one)
    return merged(state, adapter)
