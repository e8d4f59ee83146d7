"""Runs by name: each file is one Python function `recipe()` that returns a TrainConfig.

A recipe's docstring is its command, its hardware, and what to expect of time and result. Functions
are typed, commented and derived from one another, and need no parser. To make your own, write a
file with a function `recipe()` and give its path instead of a name: it is run as code.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

import torch

from qwen2vl.errors import ConfigError
from qwen2vl.train.config import TrainConfig

__all__ = ["best_device", "build", "names"]


def best_device() -> str:
    """Name the device that a run of an official model should take: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def names() -> list[str]:
    """List the recipes that ship with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build(name: str) -> TrainConfig:
    """Call the recipe of this name, or the one in the Python file at this path.

    Raises:
        ConfigError: there is no such recipe or file, it fails, or has no function `recipe`.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))()
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names())};"
        raise ConfigError(f"no recipe {name!r}; {hint} a file's name must end in .py")
    return import_module(f"{__name__}.{name}").recipe()


def _from_file(path: Path) -> Callable[[], TrainConfig]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"{path}: no such recipe file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # somebody's own code may fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: the recipe fails when it is read: {reason}") from error
    recipe: Callable[[], TrainConfig] | None = getattr(module, "recipe", None)
    if recipe is None:
        raise ConfigError(f"{path}: has no function recipe() that returns a TrainConfig")
    return recipe
