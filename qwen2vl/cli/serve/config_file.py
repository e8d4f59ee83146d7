"""The TOML file of --config: options without their dashes, as defaults of the command line.

    model = "folder"              [lora-modules]
    served-model-name = ["a"]     forms = "adapter-000500"

Relative paths are those of the file's folder, so that a file works wherever the server is started.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qwen2vl.cli.serve.lora_modules import NAME_AND_DIR, split_lora_module
from qwen2vl.cli.serve.vllm_options import describe_vllm_options
from qwen2vl.errors import InputError, suggest

__all__ = ["option_key", "read_config_file"]

TABLES = ("lora_modules", "limit_mm_per_prompt")  # options that may be tables
UNLISTED = ("config", "debug", "help")  # options that a file cannot hold


def read_config_file(path: str, command: click.Command) -> dict[str, Any]:
    """Return the options in a TOML file, by parameter name, as click's defaults.

    Args:
        path: of the file; its keys are options without --, with - or _.
        command: whose options they are.

    Raises:
        InputError: the file cannot be read, is not TOML, or has an unknown key or wrong value.
        ConfigError: a LoRA adapter has a wrong form.
    """
    where = f"--config {path}"
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # of TOML or of UTF-8
        raise InputError(f"{where}: is not TOML: {error}") from None
    parameters = {
        option_key(parameter): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name not in UNLISTED
    }
    defaults: dict[str, Any] = {}
    for key, value in content.items():
        parameter = parameters.get(key.replace("_", "-"))
        if parameter is None:
            raise InputError(_describe_unknown_key(where, key, parameters))
        assert parameter.name is not None
        given = _to_default(parameter, value, f"{where}: {key}")
        defaults[parameter.name] = _resolve_paths(parameter.name, given, Path(path).parent)
    return defaults


def option_key(parameter: click.Parameter) -> str:
    """Return the key of an option in a file: its name without the dashes."""
    return max(parameter.opts, key=len).removeprefix("--")


def _describe_unknown_key(where: str, key: str, known: Mapping[str, Any]) -> str:
    hint = describe_vllm_options([key])
    if hint is not None:
        return f"{where}: {hint}"
    return f"{where}: {key} is not an option; {suggest(key.replace('_', '-'), known)}"


def _to_default(parameter: click.Option, value: Any, where: str) -> Any:
    """Return a value of a file as the command line would give it."""
    if isinstance(value, Mapping) and parameter.name in TABLES:
        pairs = [f"{key}={one}" for key, one in value.items()]
        return pairs if parameter.multiple else ",".join(pairs)
    if isinstance(value, list) and parameter.multiple:
        return [json.dumps(one) if isinstance(one, dict) else str(one) for one in value]
    if not isinstance(value, str | int | float) or isinstance(value, bool) != parameter.is_flag:
        expected = "true or false" if parameter.is_flag else "a string or a number"
        expected = "a list of strings" if parameter.multiple else expected
        raise InputError(f"{where}: got {value!r}, must be {expected}")
    return [str(value)] if parameter.multiple else value


def _resolve_paths(name: str, value: Any, base: Path) -> Any:
    """Return the value of an option with its paths relative to `base`, the folder of the file."""
    if base == Path():
        return value
    if name == "allowed_local_media_path":
        return _join(base, str(value))
    if name == "lora_modules":
        modules = [split_lora_module(one) for one in value]
        return [json.dumps({"name": one, "path": _join(base, path)}) for one, path in modules]
    if name == "adapters":
        return [_resolve_adapter(one, base) for one in value]
    if name == "model" and value != "nano" and Path(_join(base, str(value))).is_dir():
        return _join(base, str(value))
    return value


def _resolve_adapter(value: str, base: Path) -> str:
    match = NAME_AND_DIR.fullmatch(value)
    if match is None or Path(_join(base, value)).exists():
        return _join(base, value)
    return f"{match[1]}={_join(base, match[2])}"


def _join(base: Path, path: str) -> str:
    return path if path.startswith("~") else str(base / path)
