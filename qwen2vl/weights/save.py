"""Model folder writer (save_pretrained): the official layout, which transformers loads.

The official flat layout: parameter names as they are, safetensors, configs as the released
repositories spell them, quantized layers packed as compressed-tensors. Writes are atomic: into a
temporary folder that is renamed, so that a crash or a full disk leaves the finished folder or none.
Tensors are written one by one: `save_folder` has a model's state dict, `stream_folder` gets each
tensor as soon as it is made, and only one needs to be in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError
from qwen2vl.files import atomic_folder
from qwen2vl.weights.config_files import CHAT_TEMPLATE, GenerationDefaults, read_json
from qwen2vl.weights.header import build_header
from qwen2vl.weights.packing.packed_layers import find_packed_layers
from qwen2vl.weights.packing.quantization_config import PACKED_SUFFIXES, QuantizationConfig
from qwen2vl.weights.state_dict import expected_shapes
from qwen2vl.weights.tensors import INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    from qwen2vl.processor.image import PixelLimits

__all__ = ["check_output_folder", "output_folder", "save_folder", "stream_folder"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)

# Shards of this size suit interrupted transfers and old file systems; the official ones are as
# large.
MAX_SHARD_BYTES = 4_000_000_000

_REMEDY = "nothing was changed, free some space or choose another folder"


def save_folder(
    path: str | Path,
    *,
    config: Qwen2VLConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer_folder: str | Path,
    pixels: PixelLimits,
    generation: GenerationDefaults | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quantization_config: QuantizationConfig | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a whole model folder to `path`, which must not exist yet (or be empty).

    Args:
        path: the folder to write; its parent must exist.
        config: of the model.
        state_dict: every parameter under its official name, on any device and of any dtype; of
            a packed layer its parts (`....weight_packed` and so on) in place of `....weight`.
        tokenizer_folder: the folder whose tokenizer files are copied.
        pixels: the limits images are resized to, for preprocessor_config.json.
        generation: the content of generation_config.json; None writes only special token ids.
        dtype: of the stored weights, except the parts of packed layers.
        quantization_config: the format of those parts, for config.json.
        max_shard_bytes: largest size of a file; a larger tensor gets a file of its own.

    Raises:
        CheckpointError: the folder is not empty, there is no tokenizer to copy, or the disk is
            full or not writable.
    """
    stream_folder(
        path,
        config=config,
        layout=state_dict,
        tensors=state_dict.items(),
        tokenizer_folder=tokenizer_folder,
        pixels=pixels,
        generation=generation,
        dtype=dtype,
        quantization_config=quantization_config,
        max_shard_bytes=max_shard_bytes,
    )


def stream_folder(
    path: str | Path,
    *,
    config: Qwen2VLConfig,
    layout: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_folder: str | Path,
    pixels: PixelLimits,
    generation: GenerationDefaults | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quantization_config: QuantizationConfig | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder whose tensors are made while they are written.

    Args:
        path: as of `save_folder`, as are all arguments but two.
        config: of the model.
        layout: like `state_dict` of `save_folder`, but only dtypes and shapes are used, so that
            tensors may be on meta. Its order is that of the shards.
        tensors: every name of `layout` once, in any order, with its tensor.
        tokenizer_folder: the folder whose tokenizer files are copied.
        pixels: for preprocessor_config.json.
        generation: for generation_config.json.
        dtype: of the stored weights, except the parts of packed layers.
        quantization_config: the format of those parts.
        max_shard_bytes: largest size of a file.

    Raises:
        CheckpointError: as `save_folder`.
    """
    target = Path(path)
    check_output_folder(target)
    _check_tokenizer(Path(tokenizer_folder))
    specs = {n: (_dtype(n, t, dtype), tuple(t.shape)) for n, t in layout.items()}
    _check_layout(specs, config, quantization_config)
    sizes = {name: prod(shape) * stored.itemsize for name, (stored, shape) in specs.items()}
    _check_disk_space(target, sum(sizes.values()))
    with output_folder(target, "cannot be saved", _REMEDY) as partial:
        _write_config(partial, config, dtype, quantization_config)
        _write_settings(partial, config, pixels, generation or GenerationDefaults())
        _write_tokenizer(partial, Path(tokenizer_folder))
        shards = list(_shards(sizes, max_shard_bytes))
        weight_map = _write_tensors(partial, specs, shards, tensors)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_json(partial / INDEX_FILE, index)


@contextmanager
def output_folder(target: Path, failure: str, remedy: str) -> Iterator[Path]:
    """Yield a temporary folder to write into; it is renamed to `target` once it is on disk.

    Raises:
        CheckpointError: it could not be written or renamed; the message is `failure`, the reason
            and `remedy`.
    """
    try:
        with atomic_folder(target, fsync=True) as partial:
            yield partial
            for file in partial.iterdir():
                # safetensors writes files that only the owner may read; give them the folder's
                # mode.
                file.chmod(partial.stat().st_mode & 0o666)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{target}: {failure}: {reason}; {remedy}") from error


def check_output_folder(path: str | Path) -> None:
    """Check in advance that a folder can be written at `path`.

    Raises:
        CheckpointError: it exists and is not an empty folder, or its parent does not exist.
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


def _check_disk_space(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target.absolute().parent).free
    if num_bytes > free:
        raise CheckpointError(
            f"{target}: its tensors take {num_bytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are "
            f"free there; {_REMEDY}"
        )


def _check_layout(
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    config: Qwen2VLConfig,
    quantization_config: QuantizationConfig | None,
) -> None:
    shapes = {name: shape for name, (_, shape) in specs.items()}
    if quantization_config:
        layers, wrong = find_packed_layers(build_header(specs)[1], quantization_config)
        assert not wrong, f"tensors are not those of quantization_config: {wrong[:3]}"
        for name, layer in layers.items():
            for part in layer.parts:
                del shapes[f"{name}.{part}"]
            shapes[f"{name}.weight"] = layer.shape
    assert shapes == expected_shapes(config), "tensors are not those of the model in config"


def _write_config(
    folder: Path,
    config: Qwen2VLConfig,
    dtype: torch.dtype,
    quantization_config: QuantizationConfig | None,
) -> None:
    content = config.to_dict(str(dtype).removeprefix("torch."))
    if quantization_config:
        content["quantization_config"] = quantization_config.to_dict()
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
    defaults = {f.name: getattr(generation, f.name) for f in fields(generation)}
    eos_ids = list(defaults.pop("eos_token_ids") or (config.eos_token_id,))
    return {
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.bos_token_id,
        "eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0],
        **{name: value for name, value in defaults.items() if value is not None},
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
    folder: Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    shards: list[list[str]],
    tensors: Iterable[tuple[str, Tensor]],
) -> dict[str, str]:
    """Write each tensor to its place in its file as it arrives; return names with their files."""
    weight_map: dict[str, str] = {}
    places: dict[str, tuple[BinaryIO, int]] = {}
    with ExitStack() as files:
        for number, names in enumerate(shards, start=1):
            file_name = (
                SINGLE_FILE
                if len(shards) == 1
                else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            header, infos = build_header({name: specs[name] for name in names})
            file = files.enter_context((folder / file_name).open("wb"))
            file.write(header)
            places |= {name: (file, len(header) + info.begin) for name, info in infos.items()}
            weight_map |= dict.fromkeys(names, file_name)
        for name, tensor in tensors:
            dtype, shape = specs[name]
            assert tensor.shape == shape, name
            file, position = places.pop(name)
            file.seek(position)
            file.write(_bytes_of(tensor, dtype))
    assert not places, f"never written: {list(places)[:3]}"
    return weight_map


def _bytes_of(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """Return a tensor's bytes, without a copy if it is on the CPU, contiguous and of the dtype."""
    flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the stored dtype: parts of packed layers keep that of their format."""
    is_part = name.endswith(PACKED_SUFFIXES) or not tensor.is_floating_point()
    return tensor.dtype if is_part else dtype


def _shards(sizes: Mapping[str, int], max_shard_bytes: int) -> Iterator[list[str]]:
    """Assign tensors to files of at most `max_shard_bytes`, in model order."""
    names: list[str] = []
    shard_bytes = 0
    for name, size in sizes.items():
        if names and shard_bytes + size > max_shard_bytes:
            yield names
            names, shard_bytes = [], 0
        names.append(name)
        shard_bytes += size
    if names:
        yield names


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
