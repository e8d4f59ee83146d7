"""What a person calls a model -> the folder it lies in.

A folder, the packaged `nano`, or a repo id of the Hugging Face hub, fetched once into the hub's
own cache (HF_HOME, HF_HUB_OFFLINE and HF_TOKEN mean what they mean everywhere). The only room of
this library that may reach the network for a model. Nothing is opened here. Next: settings.py.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.config_files import PICKLE_SUFFIXES, pickle_remedy

__all__ = ["NEEDED_FILES", "find"]

# Weights, settings and words; never pickles, other engines' formats or the repository's pictures.
NEEDED_FILES = ("*.json", "*.txt", "*.safetensors")

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WHAT_TO_GIVE = "give a folder, a repo id such as Qwen/Qwen2-VL-2B-Instruct, or nano"


def find(model: str | Path, *, tqdm_class: type | None = None) -> Path:
    """Return the folder of `model`, fetching a repo id if the cache lacks it.

    The string "nano" always means the packaged model; a folder of that name is "./nano".

    Args:
        model: a folder, a repo id, or "nano".
        tqdm_class: what draws the progress of a download, in place of the hub client's own bars.

    Raises:
        CheckpointError: no such folder, repository or permission; says how to get it.
    """
    if model == "nano":
        return _packaged_nano()
    path = Path(os.path.expanduser(model))  # not Path's own, which fails where nobody is ~name
    if _is_folder(path):
        return path
    if path.is_file():
        raise CheckpointError(_not_a_folder(path))
    if isinstance(model, str) and _REPO_ID.fullmatch(model):
        return _fetch(model, tqdm_class)
    raise CheckpointError(f"model {str(model)!r}: no such folder; {_WHAT_TO_GIVE}")


def _is_folder(path: Path) -> bool:
    """Tell a folder that can be listed from what is none; one without permission is refused."""
    try:
        if not path.is_dir():
            return False
        os.listdir(path)
    except OSError as error:
        raise CheckpointError(
            f"model {str(path)!r} cannot be opened: {error.strerror}; {_WHAT_TO_GIVE}"
        ) from None
    return True


def _not_a_folder(path: Path) -> str:
    if path.suffix in PICKLE_SUFFIXES:
        return f"{path} is a pickle, which can run code; {pickle_remedy(path.name)}"
    return f"{path} is a file; give the folder it lies in, with config.json beside it"


def _packaged_nano() -> Path:
    folder = Path(str(importlib.resources.files("qwen2vl"))) / "nano"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "this installation holds no nano weights; install the released package, train them "
            f"with `qwen2vl train nano`, or {_WHAT_TO_GIVE.removesuffix(', or nano')}"
        )
    return folder


def _fetch(repo_id: str, tqdm_class: type | None) -> Path:
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
    # The client's network errors belong to a different HTTP library in each of its versions.
    except Exception as error:
        raise CheckpointError(_why_not_fetched(repo_id, error)) from error


def _why_not_fetched(repo_id: str, error: Exception) -> str:
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
            f"run `hf auth login`); {_WHAT_TO_GIVE}"
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
