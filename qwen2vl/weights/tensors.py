"""The tensors of a folder under their official names, read from disk when asked for.

One file or many, either of the two key layouts that transformers has written: whoever holds a
`TensorFolder` cannot tell. Tensors on the CPU are memory-mapped, so opening 140 GB costs nothing.
Every header is verified first; pickle is never opened. Next room: fit.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.header import TensorInfo, read_header
from qwen2vl.weights.settings import PICKLE_SUFFIXES, pickle_remedy, read_json

__all__ = ["INDEX_FILE", "SINGLE_FILE", "TensorFolder", "official_name", "open_tensors", "shorten"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FLOATS = ("BF16", "F16", "F32", "F64")
_QUANTISED_ENDINGS = (".qweight", ".qzeros", ".scales", ".g_idx")

# transformers 4.52 to 4.57 may write its in-memory names; the flat ones are official.
_NESTED_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))


class TensorFolder(Mapping[str, Tensor]):
    """Official name -> tensor on the CPU, memory-mapped; shapes and dtypes without reading."""

    def __init__(self, folder: Path, files: Mapping[Path, Mapping[str, TensorInfo]]) -> None:
        self.folder = folder
        self._places = {
            official_name(key): (path, key, info)
            for path, infos in files.items()
            for key, info in infos.items()
        }
        self._open_files: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        path, key, _ = self._places[name]
        try:
            if path not in self._open_files:
                self._open_files[path] = safe_open(path, framework="pt")
            return self._open_files[path].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read; fetch it again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def info(self, name: str) -> TensorInfo:
        """Say what a tensor is without reading it."""
        return self._places[name][2]


def open_tensors(folder: Path) -> TensorFolder:
    """Open the weights of a folder, having verified every header and the index against it.

    Raises:
        CheckpointError: no safetensors, missing shards or entries (all named at once), damaged or
            truncated files, quantised or adapter weights, pickles only.
    """
    if (folder / SINGLE_FILE).is_file():
        files = {folder / SINGLE_FILE: read_header(folder / SINGLE_FILE)}
    elif (folder / INDEX_FILE).is_file():
        files = _read_shards(folder)
    else:
        raise CheckpointError(_why_no_weights(folder))
    _check_kind(folder, files)
    return TensorFolder(folder, files)


def official_name(key: str) -> str:
    """Turn a key of either layout into the official, flat one."""
    for nested, flat in _NESTED_PREFIXES:
        if key.startswith(nested):
            return flat + key.removeprefix(nested)
    return key


def shorten(names: list[str], limit: int = 8) -> str:
    """List names for an error: the first few and the count of the others."""
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
    """The index and the shards must tell the same story, tensor by tensor."""
    listed = {(key, name) for key, name in weight_map.items()}
    present = {(key, path.name) for path, infos in files.items() for key in infos}
    stories = [
        ("listed, but not in the shard", sorted(f"{k} ({f})" for k, f in listed - present)),
        ("in a shard, but not listed", sorted(f"{k} ({f})" for k, f in present - listed)),
    ]
    broken = [f"{len(names)} tensors {what}: {shorten(names)}" for what, names in stories if names]
    if broken:
        raise CheckpointError(
            f"{index}: does not match its shards: {'; '.join(broken)}; fetch the folder again"
        )


def _check_kind(folder: Path, files: Mapping[Path, Mapping[str, TensorInfo]]) -> None:
    """Refuse weights of a kind that we do not run, by its name rather than by its shapes."""
    infos = {key: info for file in files.values() for key, info in file.items()}
    if packed := [key for key in infos if key.endswith(_QUANTISED_ENDINGS)]:
        raise CheckpointError(
            f"{folder}: the weights are quantised (GPTQ or AWQ: {packed[0]}), which this version "
            "does not run; take the unquantised repository"
        )
    if adapter := [key for key in infos if ".lora_" in key]:
        raise CheckpointError(
            f"{folder}: holds a LoRA adapter ({adapter[0]}), not a model; merge it into its base "
            "model first"
        )
    if other := [
        f"{key} ({info.dtype})" for key, info in infos.items() if info.dtype not in _FLOATS
    ]:
        raise CheckpointError(
            f"{folder}: {len(other)} tensors are not of {', '.join(_FLOATS)}: {shorten(other)}"
        )
    counts = Counter(map(official_name, infos))
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise CheckpointError(f"{folder}: stored twice, in both key layouts: {shorten(twice)}")


def _why_no_weights(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    if shards := [n for n in names if n.endswith(".safetensors")]:
        if "adapter_model.safetensors" in shards:
            return (
                f"{folder}: holds a LoRA adapter, not a model; merge it into its base model first"
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
