"""PEFT adapter folders: their configuration and every file of weights in them, read and written.

The adapter's own file may be sharded, and trainers write what they trained in full into files
beside it. All of them are opened as one mapping; headers are verified as for model weights. Pickles
are never loaded: those that may hold weights are refused by name, the state of a trainer is not
read. A folder is written under a temporary name and renamed. The content is parsed by lora/peft.py.
(PEFT: LoraConfig, save_pretrained.)
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.config_files import (
    PICKLE_SUFFIXES,
    log_foreign_chat_template,
    pickle_remedy,
    read_json,
)
from qwen2vl.weights.header import read_header
from qwen2vl.weights.save import check_output_folder, output_folder
from qwen2vl.weights.tensors import TensorFolder, official_name, shorten

__all__ = ["ADAPTER_CONFIG", "ADAPTER_FILE", "read_adapter", "save_adapter"]

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_SHARD = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.safetensors")
_WHOLE_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# Pickles that trainers write beside an adapter, without weights of the model.
# (transformers: Trainer; accelerate: save_state; DeepSpeed.)
_TRAINER_STATE = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|sampler|dl_state|dataloader"
    r"|custom_checkpoint|zero_pp_rank|bf16_zero_pp_rank|trainer_state|loss_scaler)[\w.-]*"
)
# The head of a reward or value model (TRL, LLaMA-Factory, ms-swift): generation has none.
_VALUE_HEAD = re.compile(r"(value_head|v_head)\.(safetensors|bin|pt)")


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], TensorFolder]:
    """Read adapter_config.json, and open all weights of the folder under the names in the files.

    Raises:
        CheckpointError: no such folder, a file is missing or damaged, weights in a pickle, a whole
            model beside the adapter, or two files that contradict each other.
    """
    adapter_folder = Path(os.path.expanduser(folder))
    if not (adapter_folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(_missing_adapter_message(adapter_folder))
    names = sorted(path.name for path in adapter_folder.iterdir() if path.is_file())
    own = [ADAPTER_FILE] if ADAPTER_FILE in names else _shards(adapter_folder, names)
    if not own:
        raise CheckpointError(_missing_adapter_message(adapter_folder))
    settings = read_json(adapter_folder / ADAPTER_CONFIG)
    log_foreign_chat_template(adapter_folder)
    return settings, _open_files(adapter_folder, [*own, *_files_beside(adapter_folder, names)])


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


def _shards(folder: Path, names: list[str]) -> list[str]:
    """Return the shards of the adapter's file; [] if it has none."""
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    totals = {int(match[2]) for match in shards}
    numbers = sorted(int(match[1]) for match in shards)
    if shards and (len(totals) > 1 or numbers != list(range(1, max(totals) + 1))):
        raise CheckpointError(
            f"{folder}: adapter_model has {len(shards)} shards of {max(totals)}: "
            f"{shorten([match[0] for match in shards])}; fetch the others again"
        )
    return [match[0] for match in shards]


def _files_beside(folder: Path, names: list[str]) -> list[str]:
    """Return the other safetensors of the folder; refuse pickles that may hold weights.

    A pickle beside a safetensors file of the same name is what that was converted from.
    """
    beside: list[str] = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        if _VALUE_HEAD.fullmatch(name):
            logger.warning("%s: %s is not read: generation has no value head", folder, name)
        elif suffix == ".safetensors" and _WHOLE_MODEL.fullmatch(name):
            raise CheckpointError(
                f"{folder}: {name}, a whole model, is beside the adapter; move it to a folder of "
                "its own, and give that as the model, without the adapter if that is merged into it"
            )
        elif suffix == ".safetensors" and name != ADAPTER_FILE and not _SHARD.fullmatch(name):
            beside.append(name)
        elif suffix in PICKLE_SUFFIXES and not _TRAINER_STATE.fullmatch(name):
            converted = f"{stem}.safetensors"
            if converted not in names and name != _PICKLE:
                raise CheckpointError(
                    f"{folder}: {name} may hold weights that were trained with the adapter. It is "
                    "a pickle, which can run code and is never loaded; "
                    f"{_conversion(name, converted)}; remove it if it holds none of them"
                )
            if name == _PICKLE:
                converted = ADAPTER_FILE
            logger.info("%s: %s is not read: %s holds the same", folder, name, converted)
    return beside


def _open_files(folder: Path, names: list[str]) -> TensorFolder:
    """Open files as one mapping; a tensor that is in two of them must be the same in both."""
    files = {folder / name: read_header(folder / name) for name in names}
    tensors = TensorFolder(folder, files)
    first: dict[str, Path] = {}
    for path, infos in files.items():
        for key in infos:
            name = official_name(key)
            if name not in first:
                first[name] = path
            elif first[name] == path:
                raise CheckpointError(
                    f"{folder}: {name} is twice in {path.name}, in both key layouts; save it again "
                    "with one of them"
                )
            elif not _is_equal(folder, name, (first[name], path), files):
                raise CheckpointError(
                    f"{folder}: {key} is in {first[name].name} and differently in {path.name}; "
                    "remove the file that is older"
                )
    return tensors


def _is_equal(folder: Path, name: str, paths: tuple[Path, Path], files: Mapping[Path, Any]) -> bool:
    """Return whether a tensor is the same in two files."""
    one, other = (TensorFolder(folder, {path: files[path]})[name] for path in paths)
    return torch.equal(one, other)


def _conversion(name: str, converted: str) -> str:
    return pickle_remedy(name).replace("'model.safetensors'", f"'{converted}'")


def _missing_adapter_message(folder: Path) -> str:
    if folder.is_file():
        return f"adapter {str(folder)!r}: is a file; give its folder, {str(folder.parent)!r}"
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
    missing = [n for n in (ADAPTER_CONFIG, ADAPTER_FILE) if not (folder / n).is_file()]
    if len(missing) == 2 and any(_WHOLE_MODEL.fullmatch(path.name) for path in folder.iterdir()):
        return f"{folder}: is a model, no adapter; give it as the model (--model), without adapter"
    if missing == [ADAPTER_FILE] and (folder / _PICKLE).is_file():
        return (
            f"{folder}: {_PICKLE} is a pickle, which can run code and is never loaded; "
            f"{_conversion(_PICKLE, ADAPTER_FILE)}"
        )
    return (
        f"{folder}: {' and '.join(missing)} missing; give the folder that PEFT saved, with "
        f"{ADAPTER_CONFIG} and {ADAPTER_FILE}"
    )
