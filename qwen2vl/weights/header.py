"""Safetensors headers: built before tensors are written, verified before any tensor is read.

A file is `8 bytes length | JSON header | data`. The data must be covered by the header's tensors
exactly: no gap, no overlap, no missing and no trailing byte. A truncated shard is found here, by
its size, in microseconds; memory-mapped, its missing end would read as zeros or crash the process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from qwen2vl.errors import CheckpointError

__all__ = ["TORCH_DTYPES", "TensorInfo", "build_header", "read_header"]

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
HEADER_ALIGNMENT = 8  # the length of a header is padded with spaces to a multiple of this

# Dtypes by their names in a header, in the order of the safetensors library: it writes the last of
# them first, so that every tensor is aligned.
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype, shape and byte range (after the header) of one tensor of a file."""

    dtype: str  # in safetensors' spelling: BF16, F32
    shape: tuple[int, ...]
    begin: int
    end: int


def build_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Build the beginning of a file from dtypes and shapes, as the safetensors library would.

    Returns:
        The bytes before the data, and the place of each tensor in the data.
    """
    order = list(TORCH_DTYPES.values())
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name][0]), name))
    infos: dict[str, TensorInfo] = {}
    position = 0
    for name in names:
        dtype, shape = tensors[name]
        end = position + prod(shape) * dtype.itemsize
        infos[name] = TensorInfo(_DTYPE_NAMES[dtype], shape, position, end)
        position = end
    entries = {
        name: {"dtype": i.dtype, "shape": list(i.shape), "data_offsets": [i.begin, i.end]}
        for name, i in infos.items()
    }
    content = {"__metadata__": {"format": "pt"}, **entries}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, infos


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the tensors' infos of a safetensors file, and check that all their bytes are there.

    Raises:
        CheckpointError: not a safetensors file, a damaged header, or bytes missing or left over.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            head = file.read(8)
            length = _header_length(path, head, size)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    tensors = {
        name: _parse_tensor_info(path, name, entry)
        for name, entry in _parse(path, text).items()
        if name != "__metadata__"
    }
    _check_coverage(path, tensors, size - 8 - length)
    return tensors


def _header_length(path: Path, head: bytes, size: int) -> int:
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes are no safetensors file; fetch it again")
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: not a safetensors file ({_describe_content(head)}); fetch it again"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: truncated inside its header, at least {8 + length - size:,} bytes are "
            "missing; fetch it again"
        )
    return length


def _describe_content(head: bytes) -> str:
    if head.startswith(b"version "):
        return "it is a Git LFS pointer: run `git lfs pull`"
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "it looks like a pickle of torch.save"
    if head.lstrip().startswith((b"<", b"{")):
        return "it looks like a text or a web page"
    return f"its header would be {int.from_bytes(head, 'little'):,} bytes long"


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: its header is not valid JSON; fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; fetch it again")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _parse_tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    """Parse one entry of the header, and check that shape, dtype and offsets agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: its header describes {name} wrongly; fetch it again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(
            f"{path}: its header gives {name} an impossible shape or place; fetch it again"
        )
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{path}: {name} is stored as {dtype!r}, which this library does not read; take a "
            "repository of this model in BF16 or F32"
        )
    begin, end = offsets
    expected = prod(shape) * TORCH_DTYPES[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: its header gives {name} {end - begin:,} bytes where {dtype} {shape} takes "
            f"{expected:,}; fetch it again"
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_coverage(path: Path, tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            what = "overlaps the tensor before it" if info.begin < position else "leaves a gap"
            raise CheckpointError(f"{path}: its header is damaged: {name} {what}; fetch it again")
        position = info.end
    if position > data_bytes:
        raise CheckpointError(
            f"{path}: truncated, {position - data_bytes:,} of {position:,} bytes are missing; "
            "fetch it again"
        )
    if position < data_bytes:
        raise CheckpointError(
            f"{path}: {data_bytes - position:,} bytes follow the last tensor that no one "
            "describes; fetch it again"
        )
