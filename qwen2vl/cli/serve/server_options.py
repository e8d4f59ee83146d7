"""Options that `serve` and `batch` share: their values, converted to fields of ServerConfig.

A value that cannot be converted is reported by the name of the field, which `errors_name_options`
replaces by that of the option.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from qwen2vl.errors import ConfigError

__all__ = ["MAX_NUM_SEQS", "parse_media_limits", "served_model_name", "split_values"]

MAX_NUM_SEQS = 16  # of EngineConfig, which cannot be imported without torch


def split_values(
    _: click.Context, option: click.Parameter, values: Iterable[str]
) -> tuple[str, ...]:
    """Return the values of a repeatable option that also takes a,b and vLLM's JSON list.

    Raises:
        BadParameter: a value begins as a JSON list, and is none of strings.
    """
    result: list[str] = []
    for value in values:
        if value.lstrip().startswith("["):
            try:
                parsed = json.loads(value)
            except ValueError:
                parsed = None
            if not isinstance(parsed, list) or not all(isinstance(one, str) for one in parsed):
                raise click.BadParameter(f"{value!r} is not a JSON list of strings", param=option)
            result += parsed
        else:
            result += [part.strip() for part in value.split(",") if part.strip()]
    return tuple(result)


def parse_media_limits(text: str) -> dict[str, Any]:
    """Parse image=16,video=2, or JSON; ServerConfig validates the values.

    Raises:
        ConfigError: it has neither form.
    """
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        pairs = [part.split("=") for part in text.split(",")]
        return {kind.strip(): int(count) for kind, count in pairs}
    except ValueError:
        raise ConfigError(
            f'limit_mm_per_prompt: got {text}, must be as image=16,video=2 or {{"image": 16}}'
        ) from None


def served_model_name(model: str) -> str:
    """Return the name under which a model is served: never a path of this machine."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
