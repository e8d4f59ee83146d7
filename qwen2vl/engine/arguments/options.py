"""Sampling parameters and other arguments of the Python API: accepted forms, and their validation.

Sampling parameters are given as `SamplingParams` or as keywords. Fields of `SamplingParams`,
`EngineConfig` and `Grammar` are validated by these classes, arguments of `load` by it, and what
depends on the model by validation.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from qwen2vl.engine.arguments.conversations import is_list
from qwen2vl.engine.arguments.keyword_hints import check_keywords
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.errors import InputError, abbreviate
from qwen2vl.processor.processor import Processor
from qwen2vl.weights import GenerationDefaults

__all__ = [
    "as_params",
    "as_params_list",
    "check_callable",
    "check_choice",
    "check_llm_arguments",
    "check_sampling_keywords",
    "refuse_load_options",
]

_CALL_KEYWORDS = ("images", "videos", "tools", "on_delta", "params")
# Those of LLM(...) that are not None.
_LOAD_DEFAULTS = {
    **{"device": "auto", "dtype": "auto", "kv_cache_dtype": "auto"},
    **{"video_preset": "paper", "compile": False},
}


# Sampling parameters ----------------------------------------------------------------------------


def check_sampling_keywords(sampling: Mapping[str, Any]) -> None:
    """Raise an InputError for a keyword of a call that is no field of SamplingParams."""
    known = [*SamplingParams.__dataclass_fields__, *_CALL_KEYWORDS]
    check_keywords(sampling, known, "argument or sampling parameter")


def as_params(params: Any, sampling: Mapping[str, Any]) -> SamplingParams:
    """Return the parameters of one conversation, given as an object or as keywords.

    Raises:
        InputError: both are given, `params` has another type, or a keyword is unknown or invalid.
    """
    check_sampling_keywords(sampling)
    if sampling and params is not None:
        raise InputError(
            f"params: got {abbreviate(params)} and the keyword {next(iter(sampling))}; give "
            "either SamplingParams or keywords"
        )
    if params is None:
        return SamplingParams(**sampling)
    if isinstance(params, SamplingParams):
        return params
    raise _params_error("params", params)


def as_params_list(params: Any, sampling: Mapping[str, Any], count: int) -> list[SamplingParams]:
    """Return one SamplingParams for each of `count` prompts, from one for all or one for each.

    Raises:
        InputError: as `as_params`, or their number differs from `count`.
    """
    if not is_list(params) or sampling:
        return [as_params(params, sampling)] * count
    for index, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise _params_error(f"params[{index}]", one)
    if len(params) != count:
        raise InputError(f"params: got {len(params)} for {count} prompts; give one, or one each")
    return list(params)


def _params_error(name: str, params: Any) -> InputError:
    example = "temperature=0"
    if isinstance(params, Mapping) and params and all(isinstance(key, str) for key in params):
        example = ", ".join(f"{key}={value!r:.20}" for key, value in list(params.items())[:3])
        media = ""
    else:
        media = "; media are given as images=[...] or videos=[...]"
    return InputError(
        f"{name}: got {abbreviate(params)}, must be SamplingParams; pass "
        f"SamplingParams({example}), or as keywords {example}{media}"
    )


# Other arguments --------------------------------------------------------------------------------


def check_callable(name: str, value: object) -> None:
    """Raise an InputError unless the value is a function or None."""
    if value is not None and not callable(value):
        raise InputError(f"{name}: got {abbreviate(value)}, must be a function; leave it out")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise an InputError unless the value is one of several names."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(
            f"{name}: got {abbreviate(value)}, must be {' or '.join(map(repr, choices))}"
        )


def check_llm_arguments(
    *,
    processor: object,
    compile: object,
    adapters: object,
    engine: object,
    generation_defaults: object,
) -> None:
    """Check the arguments of `LLM` that `load` does not check.

    Raises:
        InputError: one has the wrong type, or two contradict each other.
    """
    expected: list[tuple[str, object, type, str]] = [
        ("processor", processor, Processor, "the second result of load(...)"),
        ("engine", engine, EngineConfig, "such as EngineConfig(max_num_seqs=4)"),
        ("generation_defaults", generation_defaults, GenerationDefaults, "of qwen2vl.weights"),
    ]
    for name, value, kind, example in expected:
        if value is not None and not isinstance(value, kind):
            raise InputError(
                f"{name}: got {abbreviate(value)}, must be of class {kind.__name__}, {example}"
            )
    if not isinstance(compile, bool):
        raise InputError(f"compile: got {abbreviate(compile)}, must be True or False")
    if adapters is not None:
        _check_adapters(adapters)
    if compile and adapters:
        raise InputError(
            "compile: layers of adapters that stay unmerged cannot be compiled; leave either "
            "out, or merge one by adapter="
        )


def _check_adapters(adapters: object) -> None:
    if not isinstance(adapters, Mapping) or not all(
        isinstance(name, str) and isinstance(folder, (str, os.PathLike))
        for name, folder in adapters.items()
    ):
        raise InputError(
            f"adapters: got {abbreviate(adapters)}, must be a dict from names to folders, such as "
            '{"receipts": "runs/lora/adapter-000500"}'
        )


def refuse_load_options(options: Mapping[str, Any], owner: str, remedy: str) -> None:
    """Refuse arguments that apply while a model is loaded, after that has happened.

    Args:
        options: the arguments that were given, or their defaults.
        owner: what exists already, for the message.
        remedy: where they belong.
    """
    for name, value in options.items():
        default = _LOAD_DEFAULTS.get(name)
        if value is not default and not (isinstance(value, str) and value == default):
            raise InputError(
                f"{name}: got {abbreviate(value)}, but {owner} is in memory already; {remedy}"
            )
