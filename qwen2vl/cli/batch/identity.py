"""What decides on the answers of a batch besides its requests: a resumed batch must have the same.

Options that only allow something, such as --allowed-local-media-path and --served-model-name, that
limit a request, such as --max-model-len, and those of speed are not among them: a request that
failed for one may be repeated with another. The ids of answers have a digest of what decides.
Which option differs is found without a record of their values: by the digests that the options
would have if one or two of them had their default or another of their choices.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any

import click

from qwen2vl.cli.serve.lora_modules import is_named_adapter, parse_lora_modules

__all__ = ["BatchIdentity", "batch_identity"]

OPTIONS = (
    *("model", "device", "dtype", "quantize", "kv_cache_dtype", "compile"),
    *("min_pixels", "max_pixels"),
    *("max_tokens", "temperature", "top_k", "top_p", "seed"),
    *("json_schema", "regex", "choice", "boxes"),
)
# Likely values of options whose type does not list them.
LIKELY: dict[str, tuple[Any, ...]] = {"device": ("cpu", "cuda"), "temperature": (0.0,)}
MAX_DIFFERENCES = 2  # options that are varied together


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variation:
    """Another value of one field."""

    field: str
    value: Any
    phrase: str  # "with --compile"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchIdentity:
    """The values that decide on the answers.

    Args:
        values: by field.
        given: options that have another value than their default, with it.
        variations: values that another run may have had.
    """

    values: Mapping[str, Any]
    given: tuple[str, ...]
    variations: tuple[_Variation, ...]

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits, which differ if anything differs."""
        return _digest(self.values)

    def describe(self, digest: str) -> str:
        """Say which options a run with another digest had: "without --compile", for example."""
        for count in range(1, MAX_DIFFERENCES + 1):
            for varied in combinations(self.variations, count):
                changes = {one.field: one.value for one in varied}
                if len(changes) == count and _digest({**self.values, **changes}) == digest:
                    return " and ".join(one.phrase for one in varied)
        if not self.given:
            return "with an option that is not given here, such as --model"
        return f"with another value of {', '.join(self.given)}, or an option that is not given here"


def batch_identity(
    given: Mapping[str, Any], command: click.Command, *, system: str | None = None
) -> BatchIdentity:
    """Return what decides on the answers.

    Args:
        given: the options of the command.
        command: has their defaults and choices.
        system: the system prompt of --images.
    """
    named = filter(is_named_adapter, given["adapters"])
    adapters = parse_lora_modules((*given["lora_modules"], *named))
    merged = [one for one in given["adapters"] if not is_named_adapter(one)]
    values: dict[str, Any] = {
        **{name: given[name] for name in OPTIONS},
        "model": _resolve(given["model"]),
        "json_schema": _schema(given["json_schema"]),
        "system": system,
        "adapters": sorted((name, _resolve(folder)) for name, folder in adapters.items()),
        "merged": [_resolve(folder) for folder in merged],
    }
    options = {
        str(one.name): one
        for one in command.params
        if isinstance(one, click.Option) and one.name in (*OPTIONS, "system")
    }
    differing = [name for name in options if _differs({**given, "system": system}, options[name])]
    adapter_phrases = [f"--adapter {one}" for one in (*adapters, *merged)]
    return BatchIdentity(
        values=values,
        given=(*(_flag(options[name]) for name in differing), *adapter_phrases),
        variations=(
            *(
                one
                for name, option in options.items()
                for one in _variations(option, values[name], name in differing)
            ),
            *_without_adapters(values),
        ),
    )


def _variations(option: click.Option, value: Any, is_given: bool) -> Iterator[_Variation]:
    name, flag, default = str(option.name), _flag(option), _default(option)
    if is_given:
        yield _Variation(field=name, value=default, phrase=f"without {flag}")
    others: tuple[Any, ...] = LIKELY.get(name, ())
    if isinstance(option.type, click.Choice):
        others = tuple(option.type.choices)
    for other in others:
        if other not in (value, default):
            shown = f"{other:g}" if isinstance(other, float) else other
            yield _Variation(field=name, value=other, phrase=f"with {flag} {shown}")
    if option.is_flag and not is_given:
        yield _Variation(field=name, value=True, phrase=f"with {flag}")


def _without_adapters(values: Mapping[str, Any]) -> Iterator[_Variation]:
    for field in ("adapters", "merged"):
        for one in values[field]:
            rest = [other for other in values[field] if other != one]
            name = one if field == "merged" else one[0]
            yield _Variation(field=field, value=rest, phrase=f"without --adapter {name}")


def _differs(given: Mapping[str, Any], option: click.Option) -> bool:
    return given[str(option.name)] != _default(option)


def _default(option: click.Option) -> Any:
    """Return the value of an option that is not given."""
    value = option.default  # click has a value of its own for an option without a default
    if isinstance(value, (str, int, float)):
        return value
    if option.is_flag:
        return False
    return () if option.multiple else None


def _flag(option: click.Option) -> str:
    return option.opts[0]


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True).encode("utf-8", "backslashreplace")
    return blake2b(text, digest_size=4).hexdigest()


def _resolve(model: str) -> str:
    """Return the absolute path of a folder, without links; the name of a repo as it is."""
    path = Path(model).expanduser()
    return os.fspath(path.resolve()) if path.exists() else model


def _schema(value: str | None) -> str | None:
    """Return a JSON schema, read from its file."""
    if value is None or value.lstrip().startswith("{"):
        return value
    return Path(value).read_text(encoding="utf-8")  # which has been read before
