"""The tensors of a folder under their official names, read from disk when asked for.

One file or many, either of the two key layouts that transformers has written, whole matrices or
packed ones: whoever holds a `TensorFolder` cannot tell, unless he asks. Tensors on the CPU are
memory-mapped, so opening 140 GB costs nothing. Every header is verified first; pickle is never
opened. Next room: fit.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.weights import awq, gptq
from qwen2vl.weights.config_files import PICKLE_SUFFIXES, pickle_remedy, read_json
from qwen2vl.weights.header import TensorInfo, read_header
from qwen2vl.weights.quantization_config import PACKED_ENDINGS, PackedMatrix, Packing

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "TensorFolder",
    "layout_of",
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
    """Official name -> tensor on the CPU, memory-mapped; shapes and dtypes without reading.

    A packed layer is one name, `....weight`: the matrix that its integers stand for, computed when
    it is asked for.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[Path, Mapping[str, TensorInfo]],
        packing: Packing | None = None,
    ) -> None:
        self.folder = folder
        self.packing = packing
        self._places = {
            official_name(key): (path, key, info)
            for path, infos in files.items()
            for key, info in infos.items()
        }
        self._open_files: dict[Path, Any] = {}
        # Layer -> (O, I); without a packing no name means anything special.
        self.packed = _find_packed(folder, self._places, packing) if packing else {}

    def __getitem__(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        return self.matrix(layer).dequantized() if layer in self.packed else self._read(name)

    def __contains__(self, name: object) -> bool:
        """Look a name up; Mapping's own way would read the tensor."""
        return isinstance(name, str) and (
            name in self._places or name.removesuffix(".weight") in self.packed
        )

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._places if name.rpartition(".")[0] not in self.packed)
        for layer in self.packed:
            yield f"{layer}.weight"
            if f"{layer}.bias" in self._places:
                yield f"{layer}.bias"

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def info(self, name: str) -> TensorInfo:
        """Say what a tensor is without reading it; a packed one is as large as it stands for."""
        layer = name.removesuffix(".weight")
        if layer in self.packed:
            return TensorInfo("packed", self.packed[layer], 0, 0)
        return self._places[name][2]

    def matrix(self, layer: str) -> PackedMatrix:
        """Read the integers of a packed layer.

        Raises:
            CheckpointError: inputs belong to groups that are not there.
        """
        assert self.packing is not None
        parts = {
            ending.removeprefix("."): self._read(layer + ending)
            for ending in PACKED_ENDINGS
            if layer + ending in self._places
        }
        matrix = layout_of(self.packing).unpack(parts, self.packing)
        groups = matrix.group_I.aminmax()
        if not 0 <= int(groups.min) <= int(groups.max) < len(matrix.scale_GO):
            raise CheckpointError(
                f"{self.folder}: {layer}.g_idx names group {int(groups.max)} of "
                f"{len(matrix.scale_GO)}; fetch the folder again"
            )
        return matrix

    def _read(self, name: str) -> Tensor:
        path, key, _ = self._places[name]
        try:
            if path not in self._open_files:
                self._open_files[path] = safe_open(path, framework="pt")
            return self._open_files[path].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read; fetch it again") from error


def open_tensors(folder: Path) -> TensorFolder:
    """Open the weights of a folder, having verified every header and the index against it.

    Raises:
        CheckpointError: no safetensors, missing shards or entries (all named at once), damaged or
            truncated files, weights of a kind that we do not run, pickles only.
    """
    config = folder / "config.json"
    raw = read_json(config).get("quantization_config") if config.is_file() else None
    packing = Packing.from_dict(raw, str(folder)) if raw else None
    if (folder / SINGLE_FILE).is_file():
        files = {folder / SINGLE_FILE: read_header(folder / SINGLE_FILE)}
    elif (folder / INDEX_FILE).is_file():
        files = _read_shards(folder)
    else:
        raise CheckpointError(_why_no_weights(folder))
    _check_kind(folder, files, packing)
    return TensorFolder(folder, files, packing)


def layout_of(packing: Packing) -> ModuleType:
    """Choose the module that knows a layout: pack, unpack, shape_of, wanted_shapes."""
    return gptq if packing.method == "gptq" else awq


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


def _find_packed(
    folder: Path, places: Mapping[str, tuple[Path, str, TensorInfo]], packing: Packing
) -> dict[str, tuple[int, int]]:
    """List the packed layers with the shapes of their matrices, having checked all their parts."""
    layout = layout_of(packing)
    found: dict[str, tuple[int, int]] = {}
    wrong: list[str] = []
    for name in (name for name in places if name.endswith(".qweight")):
        layer = name.removesuffix(".qweight")
        qweight = places[name][2].shape
        found[layer] = layout.shape_of(qweight, packing) if len(qweight) == 2 else (0, 0)
        for part, want in layout.wanted_shapes(found[layer], packing).items():
            got = places[f"{layer}.{part}"][2].shape if f"{layer}.{part}" in places else None
            if got != want and not (got is None and part == "g_idx"):
                shown = "missing" if got is None else str(list(got))
                wrong.append(f"{layer}.{part} is {shown}, expected {list(want)}")
    if wrong or not found:
        raise CheckpointError(
            f"{folder}: config.json says {packing.method.upper()} of {packing.bits} bits in groups "
            f"of {packing.group_size}, but {shorten(wrong, 3) or 'no tensor is packed'}; fetch the "
            "folder again"
        )
    return found


def _check_kind(
    folder: Path, files: Mapping[Path, Mapping[str, TensorInfo]], packing: Packing | None
) -> None:
    """Refuse weights of a kind that we do not run, by its name rather than by its shapes."""
    infos = {key: info for file in files.values() for key, info in file.items()}
    packed = {key for key in infos if key.endswith(PACKED_ENDINGS)}
    if packed and packing is None:
        raise CheckpointError(
            f"{folder}: the weights are quantized (GPTQ or AWQ: {min(packed)}), but config.json "
            "has no quantization_config that says how; fetch config.json again"
        )
    if adapter := [key for key in infos if ".lora_" in key]:
        raise CheckpointError(
            f"{folder}: holds a LoRA adapter ({adapter[0]}), not a model; open its base model, "
            "with this folder as the adapter"
        )
    if other := [
        f"{key} ({info.dtype})"
        for key, info in infos.items()
        if info.dtype not in (("I32", "F16", "BF16") if key in packed else _FLOATS)
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
