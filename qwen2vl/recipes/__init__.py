"""Training recipes by name: each module has a function `recipe()` that returns a TrainConfig.

A recipe's docstring has its command, its hardware, and the expected time and result. Recipes are
typed Python, derived from one another; stages.py has what several of them share. For your own,
write a file with a function `recipe()` and pass its path instead of a name: the file is executed.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from qwen2vl.errors import ConfigError
from qwen2vl.train.config import TrainConfig

__all__ = ["list_recipes", "load_recipe"]

_SHARED_MODULE = "stages"  # not a recipe


def list_recipes() -> list[str]:
    """List the names of the recipes in this package."""
    names = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(names - {_SHARED_MODULE})


def load_recipe(name: str) -> TrainConfig:
    """Return the config of the recipe with this name, or of the Python file at this path.

    Raises:
        ConfigError: there is no such recipe or file, it fails, or has no function `recipe`.
    """
    if name.endswith(".py"):
        return _recipe_from_file(Path(name))()
    if name not in list_recipes():
        closest = get_close_matches(name, list_recipes(), n=1)
        hint = (
            f"did you mean {closest[0]}?" if closest else f"known are {', '.join(list_recipes())};"
        )
        raise ConfigError(f"no recipe {name!r}; {hint} a file's name must end in .py")
    return import_module(f"{__name__}.{name}").recipe()


def _recipe_from_file(path: Path) -> Callable[[], TrainConfig]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"{path}: no such recipe file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: the recipe fails when it is read: {reason}") from error
    recipe: Callable[[], TrainConfig] | None = getattr(module, "recipe", None)
    if recipe is None:
        raise ConfigError(f"{path}: has no function recipe() that returns a TrainConfig")
    return recipe
