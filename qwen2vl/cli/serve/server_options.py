"""Options that `serve` and `batch` share, and their values as fields of ServerConfig.

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
from qwen2vl.server.config import ServerConfig

__all__ = [
    "DEFAULTS",
    "MAX_NUM_SEQS",
    "list_option",
    "local_media_option",
    "max_model_len_option",
    "max_num_seqs_option",
    "max_pixels_option",
    "media_domains_option",
    "media_limits_option",
    "min_pixels_option",
    "parse_media_limits",
    "served_model_name",
    "split_values",
]

DEFAULTS = ServerConfig()
MAX_NUM_SEQS = 16  # of EngineConfig, which cannot be imported without torch
MEDIA_LIMITS = ",".join(f"{kind}={count}" for kind, count in DEFAULTS.limit_mm_per_prompt.items())


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


def list_option(flag: str, metavar: str, help: str) -> Any:
    """Return a repeatable option that also takes several values in one, as `split_values` does."""
    return click.option(flag, multiple=True, callback=split_values, metavar=metavar, help=help)


max_model_len_option = click.option(
    "--max-model-len",
    type=int,
    show_default="of the model",
    help="Context length in tokens: prompt and output.",
)
max_num_seqs_option = click.option(
    "--max-num-seqs",
    type=int,
    default=MAX_NUM_SEQS,
    show_default=True,
    help="Sequences that run at the same time.",
)
media_limits_option = click.option(
    "--limit-mm-per-prompt",
    metavar="image=N,video=N",
    default=MEDIA_LIMITS,
    show_default=True,
    help="Largest number of images and videos of one request; also as JSON.",
)
local_media_option = click.option(
    "--allowed-local-media-path",
    metavar="DIR",
    help="Allow file:// URLs of images and videos in this folder.",
)
media_domains_option = list_option(
    "--allowed-media-domains",
    "HOST",
    "Allow http and https URLs of images and videos of this host; repeatable.",
)
min_pixels_option = click.option(
    "--min-pixels",
    type=int,
    show_default="of the model",
    help="Upscale images with fewer pixels than this.",
)
max_pixels_option = click.option(
    "--max-pixels",
    type=int,
    show_default="of the model",
    help="Downscale images with more pixels than this.",
)
