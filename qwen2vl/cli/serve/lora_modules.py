"""Values of --lora-modules: NAME=DIR, or vLLM's JSON object with name and path.

vLLM's option takes several values, separated by spaces; click's takes one, so `expand_lora_modules`
repeats the option before click parses the arguments. (vLLM: LoRAParserAction, LoRAModulePath.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from qwen2vl.errors import ConfigError, abbreviate

__all__ = [
    "NAME_AND_DIR",
    "expand_lora_modules",
    "is_named_adapter",
    "parse_lora_modules",
    "split_lora_module",
]

OPTION = "--lora-modules"
NAME_AND_DIR = re.compile(r"([\w.-]+)=(.+)")


def expand_lora_modules(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with --lora-modules repeated before each of several values."""
    result: list[str] = []
    is_value = False  # the argument before is the option, or one of its values
    for argument in arguments:
        if is_value and result[-1] != OPTION and _is_lora_module(argument):
            result.append(OPTION)
        elif not (is_value and result[-1] == OPTION):
            is_value = argument == OPTION or argument.startswith(f"{OPTION}=")
        result.append(argument)
    return result


def is_named_adapter(value: str) -> bool:
    """Return whether a value of --adapter is NAME=DIR, and not a folder of that name."""
    return NAME_AND_DIR.fullmatch(value) is not None and not Path(value).exists()


def parse_lora_modules(values: Iterable[str]) -> dict[str, str]:
    """Return the adapters that are served as models, name -> folder.

    Raises:
        ConfigError: one has another form, or a name is given twice.
    """
    result: dict[str, str] = {}
    for value in values:
        name, folder = split_lora_module(value)
        if name in result:
            raise ConfigError(f"lora_modules: got {value}, the name {name} is given twice")
        result[name] = folder
    return result


def split_lora_module(value: str) -> tuple[str, str]:
    """Return the name and the folder of one adapter.

    Raises:
        ConfigError: it is neither NAME=DIR nor a JSON object with name and path.
    """
    if value.lstrip().startswith("{"):
        try:
            module = json.loads(value)
        except ValueError:
            module = {}
        name, folder = module.get("name"), module.get("path")
        is_known = module.keys() <= {"name", "path", "base_model_name"}  # vLLM's; the last: unused
        if isinstance(name, str) and isinstance(folder, str) and is_known:
            return name, folder
    elif match := NAME_AND_DIR.fullmatch(value):
        return match[1], match[2]
    raise ConfigError(
        f"lora_modules: got {abbreviate(value)}, must be NAME=DIR, or "
        '{"name": "NAME", "path": "DIR"}'
    )


def _is_lora_module(argument: str) -> bool:
    if argument.startswith("-"):  # --port=9000
        return False
    return argument.startswith("{") or NAME_AND_DIR.fullmatch(argument) is not None
