"""What decides on the answers of a batch besides its requests: a resumed batch must have the same.

Options that only allow something, such as --allowed-local-media-path, and those of speed are not
among them: a request that failed without one may be repeated with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2vl.cli.serve.lora_modules import is_named_adapter, parse_lora_modules
from qwen2vl.cli.serve.server_options import parse_media_limits, served_model_name

__all__ = ["batch_identity"]

OPTIONS = (
    *("device", "dtype", "quantize", "compile", "min_pixels", "max_pixels", "max_model_len"),
    *("max_tokens", "temperature", "top_k", "top_p", "seed", "regex", "choice", "boxes"),
)


def batch_identity(
    given: Mapping[str, Any], *, question: str | None = None, system: str | None = None
) -> str:
    """Return a text that differs if anything differs that decides on the answers.

    Args:
        given: the options of the command.
        question: of --images.
        system: the system prompt of --images.
    """
    named = filter(is_named_adapter, given["adapters"])
    adapters = parse_lora_modules((*given["lora_modules"], *named))
    merged = [one for one in given["adapters"] if not is_named_adapter(one)]
    fields = {
        "question": question,
        "system": system,
        "model": _resolve(given["model"]),
        "served_model_names": given["served_model_name"] or [served_model_name(given["model"])],
        "adapters": sorted((name, _resolve(folder)) for name, folder in adapters.items()),
        "merged": [_resolve(folder) for folder in merged],
        "limit_mm_per_prompt": parse_media_limits(given["limit_mm_per_prompt"]),
        "json_schema": _schema(given["json_schema"]),
        **{name: given[name] for name in OPTIONS},
    }
    return json.dumps(fields, sort_keys=True)


def _resolve(model: str) -> str:
    """Return the absolute path of a folder, without links; the name of a repo as it is."""
    path = Path(model).expanduser()
    return os.fspath(path.resolve()) if path.exists() else model


def _schema(value: str | None) -> str | None:
    """Return a JSON schema, read from its file."""
    if value is None or value.lstrip().startswith("{"):
        return value
    return Path(value).read_text(encoding="utf-8")  # which has been read before
