"""Safetensors of a model folder, memory-mapped, as one mapping from official names to tensors.

Hides whether there is one file or shards, which of transformers' two key layouts they have, and
whether matrices are plain or packed (GPTQ, AWQ, compressed-tensors). Tensors on the CPU are
memory-mapped, so opening 140 GB costs nothing. Pages that were read stay resident until `release`,
which those call who copy a tensor. Every header is verified first; pickles are never loaded.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.config_files import PICKLE_SUFFIXES, pickle_remedy, read_json
from qwen2vl.weights.header import TORCH_DTYPES, TensorInfo, read_header
from qwen2vl.weights.packing.packed_format import QuantizedMatrix
from qwen2vl.weights.packing.packed_layers import (
    PackedLayer,
    QuantizedWeight,
    find_packed_layers,
    unpack_layer,
)
from qwen2vl.weights.packing.quantization_config import PACKED_SUFFIXES, QuantizationConfig

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "TensorFolder",
    "official_name",
    "open_tensors",
    "shorten",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FLOATS = ("BF16", "F16", "F32", "F64")

# transformers 4.52 to 4.57 may write its in-memory names; the flat ones are official.
_NESTED_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))


class TensorFolder(Mapping[str, Tensor]):
    """Official name -> tensor on the CPU, memory-mapped; `info` returns shape and dtype unread.

    A packed layer has one name, `....weight`: its dequantized matrix, computed at each access.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[Path, Mapping[str, TensorInfo]],
        quantization_config: QuantizationConfig | None = None,
    ) -> None:
        self.folder = folder
        self.quantization_config = quantization_config
        self._locations = {
            official_name(key): (path, key, info)
            for path, infos in files.items()
            for key, info in infos.items()
        }
        self._mapped_files: dict[Path, _MappedFile] = {}
        # By name of the layer; empty without quantization_config.
        self.packed_layers: dict[str, PackedLayer] = (
            _packed_layers(folder, self._locations, quantization_config)
            if quantization_config
            else {}
        )

    def __getitem__(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        return (
            self.quantized_weight(layer).dequantize()
            if layer in self.packed_layers
            else self._read(name)
        )

    def __contains__(self, name: object) -> bool:
        """Look up a name; Mapping's own implementation would read the tensor."""
        return isinstance(name, str) and (
            name in self._locations or name.removesuffix(".weight") in self.packed_layers
        )

    def __iter__(self) -> Iterator[str]:
        yield from (
            name for name in self._locations if name.rpartition(".")[0] not in self.packed_layers
        )
        for layer in self.packed_layers:
            yield f"{layer}.weight"
            if f"{layer}.bias" in self._locations:
                yield f"{layer}.bias"

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def info(self, name: str) -> TensorInfo:
        """Return a tensor's info without reading it; of a packed layer, with the unpacked shape."""
        layer = name.removesuffix(".weight")
        if layer in self.packed_layers:
            return TensorInfo("packed", self.packed_layers[layer].shape, 0, 0)
        return self._locations[name][2]

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor, which is not packed."""
        return self._locations[name][0]

    def with_replaced(self, other: TensorFolder, names: Mapping[str, str]) -> TensorFolder:
        """Return a view of this folder in which tensors of another one replace some.

        Args:
            other: the folder that holds the new tensors.
            names: name here, of a tensor that is not packed -> name in `other`.
        """
        view = copy(self)
        view._locations = self._locations | {
            name: other._locations[key] for name, key in names.items()
        }
        return view

    def quantized_weight(self, layer: str) -> QuantizedWeight:
        """Read the integers and scales of a packed layer.

        Row-major integers stay memory-mapped; those of GPTQ and AWQ are unpacked.

        Raises:
            CheckpointError: g_idx names a group that does not exist.
        """
        packed_layer = self.packed_layers[layer]
        parts = {part: self._read(f"{layer}.{part}") for part in packed_layer.parts}
        weight = unpack_layer(packed_layer, parts)
        if isinstance(weight, QuantizedMatrix):
            groups = weight.group_I.aminmax()
            if not 0 <= int(groups.min) <= int(groups.max) < len(weight.scale_GO):
                raise CheckpointError(
                    f"{self.folder}: {layer}.g_idx names group {int(groups.max)} of "
                    f"{len(weight.scale_GO)}; fetch the folder again"
                )
        return weight

    def release(self, names: Iterable[str]) -> None:
        """Drop resident pages of tensors that were copied; a later use reads the file again.

        Changes made in place are lost. Names without a tensor in the folder are ignored.
        """
        for name in names:
            layer = name.removesuffix(".weight")
            packed_layer = self.packed_layers.get(layer)
            parts = [f"{layer}.{part}" for part in packed_layer.parts] if packed_layer else [name]
            for path, _, info in (self._locations[p] for p in parts if p in self._locations):
                if path in self._mapped_files:
                    self._mapped_files[path].release(info)

    def _read(self, name: str) -> Tensor:
        path, _, info = self._locations[name]
        try:
            if path not in self._mapped_files:
                self._mapped_files[path] = _MappedFile(path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: {name} cannot be read: {error.strerror or error}; check its permissions, "
                "or fetch it again"
            ) from error
        return self._mapped_files[path].tensor(info)


class _MappedFile:
    """A safetensors file with a verified header, mapped privately: writes never reach the file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._data_start = 8 + int.from_bytes(self._map[:8], "little")

    def tensor(self, info: TensorInfo) -> Tensor:
        """Return a tensor whose storage is in the mapping, and keeps it open."""
        dtype = TORCH_DTYPES[info.dtype]
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=dtype)
        start = self._data_start + info.begin
        flat = torch.frombuffer(self._map, dtype=dtype, count=prod(info.shape), offset=start)
        return flat.view(info.shape)

    def release(self, info: TensorInfo) -> None:
        """Drop the pages that hold nothing but this tensor, where the system can."""
        page = mmap.PAGESIZE
        first = -(-(self._data_start + info.begin) // page) * page
        end = (self._data_start + info.end) // page * page
        if first < end and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)


def open_tensors(folder: Path) -> TensorFolder:
    """Open the weights of a folder; verifies every header, and the index against the shards.

    Raises:
        CheckpointError: no safetensors, missing shards or entries (all named at once), damaged or
            truncated files, an unsupported format of weights, pickles only.
    """
    config = folder / "config.json"
    raw = read_json(config).get("quantization_config") if config.is_file() else None
    quantization_config = QuantizationConfig.from_dict(raw, str(folder)) if raw else None
    if (folder / SINGLE_FILE).is_file():
        files = {folder / SINGLE_FILE: read_header(folder / SINGLE_FILE)}
    elif (folder / INDEX_FILE).is_file():
        files = _read_shards(folder)
    else:
        raise CheckpointError(_missing_weights_message(folder))
    _check_supported(folder, files, quantization_config)
    return TensorFolder(folder, files, quantization_config)


def official_name(key: str) -> str:
    """Convert a key of either layout to the official, flat name."""
    for nested, flat in _NESTED_PREFIXES:
        if key.startswith(nested):
            return flat + key.removeprefix(nested)
    return key


def shorten(names: list[str], limit: int = 8) -> str:
    """Format names for an error: the first ones and the number of the others."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


def _read_shards(folder: Path) -> dict[Path, dict[str, TensorInfo]]:
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise CheckpointError(
            f"{index}: no weight_map of tensor names to file names in this folder; fetch it again"
        )
    shards = sorted(set(weight_map.values()))
    if missing := [name for name in shards if not (folder / name).is_file()]:
        keys = sorted(key for key, name in weight_map.items() if name in missing)
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {shorten(missing)}, "
            f"with {len(keys)} tensors: {shorten(keys, 3)}; fetch them again"
        )
    files = {folder / name: read_header(folder / name) for name in shards}
    _check_index(index, weight_map, files)
    return files


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _check_index(
    index: Path, weight_map: Mapping[str, str], files: Mapping[Path, Mapping[str, TensorInfo]]
) -> None:
    """Check that the index and the shards list the same tensors."""
    listed = {(key, name) for key, name in weight_map.items()}
    present = {(key, path.name) for path, infos in files.items() for key in infos}
    differences = [
        ("listed, but not in the shard", sorted(f"{k} ({f})" for k, f in listed - present)),
        ("in a shard, but not listed", sorted(f"{k} ({f})" for k, f in present - listed)),
    ]
    problems = [
        f"{len(names)} tensors {what}: {shorten(names)}" for what, names in differences if names
    ]
    if problems:
        raise CheckpointError(
            f"{index}: does not match its shards: {'; '.join(problems)}; fetch the folder again"
        )


def _packed_layers(
    folder: Path,
    locations: Mapping[str, tuple[Path, str, TensorInfo]],
    config: QuantizationConfig,
) -> dict[str, PackedLayer]:
    """Return the packed layers; checks shapes and dtypes of all their tensors."""
    infos = {name: info for name, (_, _, info) in locations.items()}
    found, wrong = find_packed_layers(infos, config)
    if wrong or not found:
        raise CheckpointError(
            f"{folder}: config.json says {config.describe()}, but "
            f"{shorten(wrong, 3) or 'no tensor is packed'}; fetch the folder again"
        )
    return found


def _check_supported(
    folder: Path,
    files: Mapping[Path, Mapping[str, TensorInfo]],
    quantization_config: QuantizationConfig | None,
) -> None:
    """Refuse unsupported formats of weights; the error names the format."""
    infos = {key: info for file in files.values() for key, info in file.items()}
    packed = {key for key in infos if key.endswith(PACKED_SUFFIXES)}
    if packed and quantization_config is None:
        raise CheckpointError(
            f"{folder}: the weights are quantized ({min(packed)}), but config.json has no "
            "quantization_config that says how; fetch config.json again"
        )
    # Their dtypes are checked with their shapes. Beside its scale a `.weight` is packed, too.
    packed |= {key for key in infos if f"{key}_scale" in packed}
    if adapter := [key for key in infos if ".lora_" in key]:
        raise CheckpointError(
            f"{folder}: holds a LoRA adapter ({adapter[0]}), not a model; open its base model, "
            "with this folder as the adapter"
        )
    if other := [
        f"{key} ({info.dtype})"
        for key, info in infos.items()
        if key not in packed and info.dtype not in _FLOATS
    ]:
        raise CheckpointError(
            f"{folder}: {len(other)} tensors are not of {', '.join(_FLOATS)}: {shorten(other)}; "
            "take a repository of this model in one of these"
        )
    counts = Counter(map(official_name, infos))
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise CheckpointError(f"{folder}: stored twice, in both key layouts: {shorten(twice)}")


def _missing_weights_message(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    if shards := [n for n in names if n.endswith(".safetensors")]:
        if "adapter_model.safetensors" in shards:
            return (
                f"{folder}: holds a LoRA adapter, not a model; open its base model, with this "
                "folder as the adapter"
            )
        return f"{folder}: {INDEX_FILE} is missing for {shorten(shards)}; fetch it again"
    if pickles := [n for n in names if n.endswith(PICKLE_SUFFIXES)]:
        return (
            f"{folder}: {shorten(pickles)}: a pickle can run code and is never loaded; "
            f"{pickle_remedy(pickles[0])}"
        )
    return (
        f"{folder}: no weights: {SINGLE_FILE} or {INDEX_FILE} is missing (found "
        f"{shorten(names) or 'nothing'}); fetch the folder again"
    )
