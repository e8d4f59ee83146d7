"""Export: a training checkpoint -> a model folder in the Hugging Face layout, or a PEFT adapter.

The manifest of a checkpoint has the model's config, its pixel limits and the path of its tokenizer;
sharded weights of any world size are assembled on the CPU. For a run with an adapter, the exported
model has the LoRA factors merged, and the factors are exported to a second folder. `train` calls it
at the end of a run; `qwen2vl export` for any checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.config import MERGED_ADAPTERS, Qwen2VLConfig
from qwen2vl.errors import CheckpointError
from qwen2vl.lora.layers import LoraConfig
from qwen2vl.lora.peft import merged_adapters
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.train import checkpoint
from qwen2vl.train.adapter import (
    adapter_config_of,
    digest_of_adapter,
    empty_tensors,
    merge_adapter,
    write_adapter,
)
from qwen2vl.weights.config_files import GenerationDefaults
from qwen2vl.weights.save import save_folder
from qwen2vl.weights.state_dict import expected_shapes

__all__ = ["export_adapter", "export_metadata", "export_model"]

GREEDY = GenerationDefaults(do_sample=False)


def export_metadata(
    processor: Processor, tokenizer_folder: Path, run_folder: Path
) -> dict[str, Any]:
    """Return what an export needs beside the weights, for the manifest of a checkpoint."""
    tokenizer_folder, run_folder = tokenizer_folder.resolve(), run_folder.resolve()
    is_inside_run = run_folder in tokenizer_folder.parents
    vision = processor.config.vision
    return {
        "model": processor.config.to_dict("float32"),
        "preprocessor": {
            **asdict(processor.pixels),
            "image_mean": list(vision.image_mean),
            "image_std": list(vision.image_std),
        },
        # Relative inside the run's folder, which may be moved.
        "tokenizer": os.path.relpath(tokenizer_folder, run_folder)
        if is_inside_run
        else str(tokenizer_folder),
    }


def export_model(source: Path, target: Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write the model of a checkpoint, or of a run's last one, to `target`.

    Args:
        source: the folder of a checkpoint or of a run.
        target: the model folder to write.
        metadata: from `export_metadata`, in place of the manifest's.

    Returns:
        The checkpoint that was exported.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or `target` cannot be created.
    """
    checkpoint_path = (
        source if (source / checkpoint.MANIFEST).is_file() else checkpoint.latest_checkpoint(source)
    )
    if checkpoint_path is None:
        raise CheckpointError(_missing_checkpoint_message(source))
    distributed = DistributedContext(torch.device("cpu"))
    checkpoint.verify(checkpoint_path, distributed)
    state = metadata or checkpoint.read_manifest(checkpoint_path)
    try:
        config = Qwen2VLConfig.from_dict(state["model"], state["preprocessor"])
        pixels = PixelLimits.from_dict(state["preprocessor"])
        tokenizer_folder = checkpoint_path.parent / state["tokenizer"]
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint_path}: made by an older version, which exported at the end of a run "
            "only; resume the run with max_minutes=0.01 to export it"
        ) from error
    state_dict, digests = _model_state_dict(
        checkpoint_path, config, adapter_config_of(state), distributed
    )
    save_folder(
        target,
        config=_with_merged_adapters(config, digests),
        state_dict=state_dict,
        tokenizer_folder=tokenizer_folder,
        pixels=pixels,
        generation=GREEDY,
    )
    return checkpoint_path


def _missing_checkpoint_message(source: Path) -> str:
    if checkpoint.latest_checkpoint(source.parent) is not None:
        return f"{source}: is no checkpoint; give its run, {source.parent}, or a step-N inside"
    return (
        f"{source}: neither a checkpoint nor a run's folder with one; give the output_dir of "
        "`qwen2vl train`, as runs/lora"
    )


def export_adapter(checkpoint_path: Path, target: Path, metadata: Mapping[str, Any]) -> None:
    """Write the LoRA factors of a checkpoint to `target`, in PEFT's format.

    Raises:
        CheckpointError: the checkpoint cannot be read, or `target` cannot be created.
    """
    adapter = adapter_config_of(metadata)
    assert adapter is not None, "this run has no adapter"
    factor_shapes = {
        name: size
        for name, size in checkpoint.tensor_shapes(checkpoint_path).items()
        if ".lora_" in name
    }
    factors = empty_tensors(factor_shapes)
    checkpoint.load_tensors(checkpoint_path, factors, DistributedContext(torch.device("cpu")))
    config = Qwen2VLConfig.from_dict(metadata["model"], metadata["preprocessor"])
    write_adapter(target, factors, adapter, config, base=metadata["config"]["init"])


def _with_merged_adapters(config: Qwen2VLConfig, digests: tuple[str, ...]) -> Qwen2VLConfig:
    """Record adapters in config.json, so that they are not applied to the model once more."""
    merged = [*merged_adapters(config), *digests]
    return replace(config, extra={**config.extra, MERGED_ADAPTERS: merged}) if merged else config


def _model_state_dict(
    checkpoint_path: Path,
    config: Qwen2VLConfig,
    adapter: LoraConfig | None,
    distributed: DistributedContext,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the state dict of the plain model, and the digest of the adapter merged into it."""
    if adapter is None:
        tensors = {name: torch.empty(shape) for name, shape in expected_shapes(config).items()}
        checkpoint.load_tensors(checkpoint_path, tensors, distributed)
        return tensors, ()
    state = empty_tensors(checkpoint.tensor_shapes(checkpoint_path))
    checkpoint.load_tensors(checkpoint_path, state, distributed)
    return merge_adapter(state, adapter), (digest_of_adapter(state, adapter),)
