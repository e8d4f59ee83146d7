"""Which model has answered: its weights by their SHA-256, and the options that change them.

It stands in the header of a results file, without paths: a folder may be moved, and a retrained
model of the same name and shapes has another digest. Of a server only the model's name is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from qwen2vl.errors import InputError

__all__ = ["local_identity", "server_identity"]

# Options and their defaults, which stand for an absent option and None, too.
OPTIONS: Mapping[str, Any] = {"dtype": "auto", "quantize": None, "compile": False}
# Left out where it has its default: results files of earlier versions do not have it.
LATER_OPTIONS: Mapping[str, Any] = {"kv_cache_dtype": "auto"}
READ_BYTES = 1 << 24
DIGITS = 16  # hexadecimal ones of a digest, which tell models apart
WEIGHTS = "*.safetensors"
CONFIG_FILES = ("config.json", "preprocessor_config.json")


def local_identity(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of the model of the options; its files are read.

    Args:
        given: options of the command: model, adapters, and those of OPTIONS and LATER_OPTIONS.
            All but the model may be absent.

    Raises:
        InputError: a file cannot be read.
        CheckpointError: there is no such model.
    """
    from qwen2vl.weights import resolve_model

    folder = Path(resolve_model(given["model"]))
    adapters = [Path(one) for one in given.get("adapters", ())]
    return {
        "name": Path(given["model"]).name or given["model"],
        "weights": _digest([*sorted(folder.glob(WEIGHTS)), *(folder / n for n in CONFIG_FILES)]),
        "adapters": [_digest(sorted(adapter.glob(WEIGHTS))) for adapter in adapters],
        **{
            name: default if given.get(name) is None else given[name]
            for name, default in OPTIONS.items()
        },
        **{
            name: given[name]
            for name, default in LATER_OPTIONS.items()
            if given.get(name) not in (None, default)
        },
    }


def server_identity(model: str) -> dict[str, Any]:
    """Return the identity of a server's model."""
    return {"name": model, "server": True}


def _digest(paths: Iterable[Path]) -> str:
    """Return a digest of the names and contents of the files that exist."""
    hasher = sha256()
    for path in paths:
        if not path.is_file():
            continue
        hasher.update(path.name.encode() + b"\0")
        try:
            with path.open("rb") as file:
                while chunk := file.read(READ_BYTES):
                    hasher.update(chunk)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return hasher.hexdigest()[:DIGITS]
