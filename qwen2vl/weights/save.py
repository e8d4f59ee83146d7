"""A model -> a folder that every program that knows Qwen2-VL opens, transformers included.

The official flat layout: names of parameters as they are, safetensors, config and settings as the
released repositories spell them, packed layers as GPTQ and AWQ have them. Written aside and
renamed as a whole, so that a crash or a full disk leaves either the finished folder or none.
Next: load.py, the way back in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError
from qwen2vl.weights.config_files import CHAT_TEMPLATE, GenerationDefaults, read_json
from qwen2vl.weights.quantization_config import PACKED_ENDINGS, Packing
from qwen2vl.weights.state_dict import expected_shapes
from qwen2vl.weights.tensors import INDEX_FILE, SINGLE_FILE, layout_of

if TYPE_CHECKING:
    from qwen2vl.processor.image import PixelLimits

__all__ = ["check_target", "save_folder", "whole_folder"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)

# Parts of this size survive interrupted transfers and old file systems; the official ones are as
# large.
MAX_SHARD_BYTES = 4_000_000_000


def save_folder(
    path: str | Path,
    *,
    config: Qwen2VLConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer_folder: str | Path,
    pixels: PixelLimits,
    generation: GenerationDefaults | None = None,
    dtype: torch.dtype = torch.bfloat16,
    packing: Packing | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a whole model folder to `path`, which must not exist yet (or be empty).

    Args:
        path: the folder to make; its parent must exist.
        config: what the model is.
        state_dict: every parameter under its official name, on any device and of any dtype; of
            a packed layer its parts (`....qweight` and so on) in place of `....weight`.
        tokenizer_folder: the folder whose tokenizer files are copied.
        pixels: the limits a picture is resized to, for preprocessor_config.json.
        generation: what generation_config.json shall propose; None writes only the end token.
        dtype: what the weights are stored as, but for the parts of packed layers.
        packing: how those parts are packed, for config.json.
        max_shard_bytes: begin another file beyond this size; a larger tensor gets its own.

    Raises:
        CheckpointError: something is there already, there is no tokenizer to copy, or the disk is
            full or not writable.
    """
    target = Path(path)
    check_target(target)
    _check_tokenizer(Path(tokenizer_folder))
    _check_state(state_dict, config, packing)
    remedy = "nothing was changed, free some space or choose another folder"
    with whole_folder(target, "cannot be saved", remedy) as partial:
        _write_config(partial, config, dtype, packing)
        _write_settings(partial, config, pixels, generation or GenerationDefaults())
        _write_tokenizer(partial, Path(tokenizer_folder))
        _write_tensors(partial, state_dict, dtype, max_shard_bytes)


@contextmanager
def whole_folder(target: Path, failure: str, remedy: str) -> Iterator[Path]:
    """Lend a folder aside to write into; it takes the name `target` once all of it is on disk.

    Raises:
        CheckpointError: it could not be written or renamed: `failure`, the reason, `remedy`.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        # What a killed run left behind under this name was never finished: nobody can need it.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            # safetensors lets its owner alone read a file; whoever sees the folder may read this.
            file.chmod(partial.stat().st_mode & 0o666)
        _flush(partial)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{target}: {failure}: {reason}; {remedy}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(path: str | Path) -> None:
    """Find out before the work whether a folder can be made at `path`.

    Raises:
        CheckpointError: something is there already, or there is no folder to make it in.
    """
    target = Path(path)
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise CheckpointError(
            f"{target}: exists already and is not an empty folder; choose another name, or remove "
            "it first"
        )
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"{target}: there is no folder {target.parent}; make it first")


def _check_tokenizer(source: Path) -> None:
    if not any((source / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(
            f"{source}: no tokenizer to copy (tokenizer.json, or vocab.json with merges.txt); name "
            "the folder of a whole model"
        )


def _check_state(
    state_dict: Mapping[str, Tensor], config: Qwen2VLConfig, packing: Packing | None
) -> None:
    given = {
        name: tuple(tensor.shape)
        for name, tensor in state_dict.items()
        if not name.endswith(PACKED_ENDINGS)
    }
    for name, tensor in state_dict.items():
        if packing and name.endswith(".qweight"):
            layer = name.removesuffix(".qweight")
            given[f"{layer}.weight"] = layout_of(packing).shape_of(tuple(tensor.shape), packing)
    assert given == expected_shapes(config), "state_dict is not that of the model in config"


def _write_config(
    folder: Path, config: Qwen2VLConfig, dtype: torch.dtype, packing: Packing | None
) -> None:
    content = config.to_dict(str(dtype).removeprefix("torch."))
    if packing:
        content["quantization_config"] = packing.to_dict()
    _write_json(folder / "config.json", content)


def _write_settings(
    folder: Path, config: Qwen2VLConfig, pixels: PixelLimits, generation: GenerationDefaults
) -> None:
    _write_json(folder / "preprocessor_config.json", _preprocessor(config, pixels))
    _write_json(folder / "generation_config.json", _generation(config, generation))
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _preprocessor(config: Qwen2VLConfig, pixels: PixelLimits) -> dict[str, Any]:
    vision = config.vision
    return {
        "min_pixels": pixels.min_pixels,
        "max_pixels": pixels.max_pixels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }


def _generation(config: Qwen2VLConfig, generation: GenerationDefaults) -> dict[str, Any]:
    given = {f.name: getattr(generation, f.name) for f in fields(generation)}
    ends = list(given.pop("eos_token_ids") or (config.eos_token_id,))
    return {
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        **{name: value for name, value in given.items() if value is not None},
    }


def _write_tokenizer(folder: Path, source: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    settings = source / "tokenizer_config.json"
    content = read_json(settings) if settings.is_file() else {}
    content |= {"tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT_TEMPLATE}
    _write_json(folder / "tokenizer_config.json", content)


def _write_tensors(
    folder: Path, state_dict: Mapping[str, Tensor], dtype: torch.dtype, max_shard_bytes: int
) -> None:
    sizes = {name: t.numel() * _dtype(name, t, dtype).itemsize for name, t in state_dict.items()}
    shards = list(_shards(sizes, max_shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = (
            SINGLE_FILE
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        # One shard at a time is brought to the CPU and cast.
        given = {name: state_dict[name].detach() for name in names}
        shard = {n: t.to("cpu", _dtype(n, t, dtype)).contiguous() for n, t in given.items()}
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index)


def _dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Parts of packed layers stay what their format makes them."""
    return tensor.dtype if name.endswith(PACKED_ENDINGS) else dtype


def _shards(sizes: Mapping[str, int], max_shard_bytes: int) -> Iterator[list[str]]:
    """Fill one file after the other, in the order of the model."""
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > max_shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(folder: Path) -> None:
    """Force the files to disk, so that the rename cannot outlive their contents."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
