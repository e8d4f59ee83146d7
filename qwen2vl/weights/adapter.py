"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors, read and written.

The safetensors header is verified as for model weights, and pickles are never loaded; a folder is
written under a temporary name and renamed. The content is parsed by lora/peft.py. (PEFT:
LoraConfig, save_pretrained.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.config_files import pickle_remedy, read_json
from qwen2vl.weights.header import read_header
from qwen2vl.weights.save import check_output_folder, output_folder
from qwen2vl.weights.tensors import TensorFolder

__all__ = ["ADAPTER_CONFIG", "ADAPTER_FILE", "read_adapter", "save_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], TensorFolder]:
    """Read adapter_config.json, and open the adapter's tensors under the names in the file.

    Raises:
        CheckpointError: no such folder, one of the two files is missing or damaged, or a pickle.
    """
    adapter_folder = Path(os.path.expanduser(folder))
    if missing := [n for n in (ADAPTER_CONFIG, ADAPTER_FILE) if not (adapter_folder / n).is_file()]:
        raise CheckpointError(_missing_adapter_message(adapter_folder, missing))
    settings = read_json(adapter_folder / ADAPTER_CONFIG)
    path = adapter_folder / ADAPTER_FILE
    return settings, TensorFolder(adapter_folder, {path: read_header(path)})


def save_adapter(
    folder: str | Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write an adapter to `folder`, which must not exist yet (or be empty).

    Raises:
        CheckpointError: the folder is not empty, or the disk is full or not writable.
    """
    target = Path(folder)
    check_output_folder(target)
    remedy = "free some space or choose another folder"
    with output_folder(target, "the adapter cannot be saved", remedy) as partial:
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (partial / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(state, partial / ADAPTER_FILE, metadata={"format": "pt"})


def _missing_adapter_message(folder: Path, missing: list[str]) -> str:
    if not folder.is_dir():
        return f"adapter {str(folder)!r}: no such folder; give the folder that PEFT saved"
    if inside := sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")):
        several = f", the last of {len(inside)}" if len(inside) > 1 else ""
        return (
            f"{folder}: is no adapter, but the folder of a run; give the adapter inside, "
            f"{inside[-1]}{several}"
        )
    beside = folder.parent / f"adapter-{folder.name.rpartition('-')[2]}"  # model-N, step-N of a run
    if (beside / ADAPTER_CONFIG).is_file():
        return f"{folder}: is no adapter; give the one of the same step, {beside}"
    if missing == [ADAPTER_FILE] and (folder / _PICKLE).is_file():
        remedy = pickle_remedy(_PICKLE).replace("'model.safetensors'", f"'{ADAPTER_FILE}'")
        return f"{folder}: {_PICKLE} is a pickle, which can run code and is never loaded; {remedy}"
    return (
        f"{folder}: {' and '.join(missing)} missing; give the folder that PEFT saved, with "
        f"{ADAPTER_CONFIG} and {ADAPTER_FILE}"
    )
