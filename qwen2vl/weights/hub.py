"""Resolves a model name (a folder, a Hugging Face repo id, or "nano") to a local folder.

A repo id is downloaded once into the hub's own cache (HF_HOME, HF_HUB_OFFLINE and HF_TOKEN have
their usual meaning). This is the only module that accesses the network for a model. The folder's
files are not read here. (HF: snapshot_download.)
"""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from qwen2vl.errors import CheckpointError, InputError, abbreviate
from qwen2vl.weights.config_files import PICKLE_SUFFIXES, pickle_remedy

__all__ = ["NEEDED_FILES", "resolve_model"]

# Weights, configs and tokenizer; never pickles, other engines' formats or the repository's images.
NEEDED_FILES = ("*.json", "*.txt", "*.safetensors")

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REMEDY = "give a folder, a repo id such as Qwen/Qwen2-VL-2B-Instruct, or nano"


def resolve_model(model: str | Path, *, tqdm_class: type | None = None) -> Path:
    """Return the folder of `model`, downloading a repo id if it is not cached.

    The string "nano" always means the packaged model; a folder of that name is "./nano".

    Args:
        model: a folder, a repo id, or "nano".
        tqdm_class: progress bar class for downloads, in place of the hub client's own.

    Raises:
        CheckpointError: no such folder, repository or permission; the message has the remedy.
        InputError: `model` is neither text nor a path.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(
            f"model: got {abbreviate(model)}, must be a folder, a repo id of the hub, or 'nano'"
        )
    if model == "nano":
        return _packaged_nano()
    path = Path(os.path.expanduser(model))  # Path.expanduser raises if ~name is not a user
    if _is_folder(path):
        return path
    if path.is_file():
        raise CheckpointError(_not_a_folder_message(path))
    if isinstance(model, str) and _REPO_ID.fullmatch(model):
        return _download(model, tqdm_class)
    raise CheckpointError(f"model {str(model)!r}: no such folder; {_REMEDY}")


def _is_folder(path: Path) -> bool:
    """Return whether `path` is a folder; raises if it cannot be listed."""
    try:
        if not path.is_dir():
            return False
        os.listdir(path)
    except OSError as error:
        raise CheckpointError(
            f"model {str(path)!r} cannot be opened: {error.strerror}; {_REMEDY}"
        ) from None
    return True


def _not_a_folder_message(path: Path) -> str:
    if path.suffix in PICKLE_SUFFIXES:
        return f"{path} is a pickle, which can run code; {pickle_remedy(path.name)}"
    return f"{path} is a file; give the folder it lies in, with config.json beside it"


def _packaged_nano() -> Path:
    folder = Path(str(importlib.resources.files("qwen2vl"))) / "nano"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "this installation holds no nano weights; install the released package, train them "
            f"with `qwen2vl train nano`, or {_REMEDY.removesuffix(', or nano')}"
        )
    return folder


def _download(repo_id: str, tqdm_class: type | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo_id,
                allow_patterns=list(NEEDED_FILES),
                ignore_patterns=["*/*"],
                tqdm_class=tqdm_class,
            )
        )
    # The hub client's network errors come from a different HTTP library in each of its versions.
    except Exception as error:
        raise CheckpointError(_download_error_message(repo_id, error)) from error


def _download_error_message(repo_id: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    command = f"hf download {repo_id}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo_id}: access to this repository must be granted first; accept its terms on "
            f"https://huggingface.co/{repo_id}, run `hf auth login`, then `{command}`"
        )
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return (
            f"{repo_id}: no such folder here and no such repository on the hub (or it is private: "
            f"run `hf auth login`); {_REMEDY}"
        )
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, errors.LocalEntryNotFoundError)
    ):
        return (
            f"{repo_id}: cannot be written to the cache {constants.HF_HUB_CACHE}: "
            f"{os.strerror(error.errno)}; free some space, or set HF_HOME to another disk"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"{repo_id}: not complete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is "
            f"set; unset it and run `{command}`, or give a folder"
        )
    return (
        f"{repo_id}: not in the cache {constants.HF_HUB_CACHE}, and the hub cannot be reached "
        f"({type(error).__name__}); with a connection, run `{command}`, or give a folder"
    )
