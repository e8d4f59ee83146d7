"""Refusals of request bodies that do not match their pydantic model.

The text is ours, not pydantic's: it names the path as the client wrote it, the value, and what is
accepted; an unknown field gets the nearest known one, or the one that has its meaning in this API.
Of the alternatives of a union only the one that matches furthest is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qwen2vl.errors import InputError, abbreviate, suggest
from qwen2vl.server.errors import APIError
from qwen2vl.server.protocol.sampling import Unsupported

__all__ = ["validation_error"]

MAX_PART = 100  # characters of a name in a path

# Type of pydantic's error -> what the value must be; fields in braces are of its context.
REQUIREMENTS = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "prompt_type": "a text, token ids, or a list of them",
    "string_or_list_type": "a string or a list of strings",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "none_required": "null",
    "union_tag_invalid": "one of {expected_tags}",
    "string_pattern_mismatch": "a string that matches {pattern}",
}

# What is too long or too short is told by its length, not by its content.
LENGTHS = {
    "string_too_short": "got {length:,} characters, must be at least {min_length:,}",
    "string_too_long": "got {length:,} characters, at most {max_length:,} are allowed",
    "too_short": "got {length:,}, at least {min_length:,} must be given",
    "too_long": "got {length:,}, at most {max_length:,} are allowed",
}

# Field of another API -> fields that have its meaning; the first that the request has is named.
ALIASES: Mapping[str, Sequence[str]] = {
    "max_tokens": ("max_output_tokens",),
    "max_completion_tokens": ("max_output_tokens", "max_tokens"),
    "max_output_tokens": ("max_completion_tokens", "max_tokens"),
    "max_new_tokens": ("max_output_tokens", "max_tokens"),
    "messages": ("input", "prompt"),
    "input": ("prompt", "messages", "tokens"),
    "prompt": ("input", "messages", "tokens"),
    "text": ("prompt", "response_format", "input", "tokens"),
    "token_ids": ("tokens", "prompt", "input"),
    "instructions": ("messages", "prompt", "input"),
    "system": ("instructions", "messages"),
    "response_format": ("text.format",),
    "structured_outputs": ("text.format",),
    "guided_json": ("text.format",),
    "json_schema": ("response_format", "text.format"),
    "functions": ("tools",),
    "function_call": ("tool_choice",),
    "stop_sequences": ("stop",),
    "best_of": ("n",),
}


def validation_error(error: ValidationError, body: Any, model: type[BaseModel]) -> APIError:
    """Convert pydantic's error into a refusal that names the path in the body.

    Args:
        error: what validation raised.
        body: the parsed JSON.
        model: the model it was validated against.
    """
    if not isinstance(body, Mapping):
        got = abbreviate(body)
        return APIError(400, f"the request body: got {got}, must be an object", code="invalid_type")
    details = error.errors(include_url=False)
    path, detail = max(
        ((_path(item, body), item) for item in details),
        # Of equal length, the field of another API says more than the one that is missing for it.
        key=lambda pair: (len(pair[0]), bool(_find_alias(pair[1], pair[0], model))),
    )
    if detail["type"] == "union_tag_not_found":
        path = [*path, _discriminator(detail)]
    name = format_path(path)
    return APIError(
        400,
        f"{name}: {_describe(detail, path, model)}",
        param=name,
        code=_code(detail),
    )


def format_path(path: Sequence[str | int]) -> str:
    """Return a path as clients write it: messages[0].content[1].text."""
    text = ""
    for part in path:
        if isinstance(part, str) and len(part) > MAX_PART:  # of an unknown field
            part = f"{part[:MAX_PART]}..."
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the request body"


def _path(detail: ErrorDetails, body: Any) -> list[str | int]:
    """Return where an error is, without the names of union members that pydantic adds."""
    path: list[str | int] = []
    value = body
    loc = detail["loc"]
    for index, part in enumerate(loc):
        if _has(value, part):
            value = value[part]
        elif index < len(loc) - 1 or detail["type"] != "missing":
            continue
        path.append(part)
    return path


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _describe(detail: ErrorDetails, path: Sequence[str | int], model: type[BaseModel]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        return "is missing; this field is required"
    if kind == "union_tag_not_found":
        return f"is missing; give one of {', '.join(_tags_at(model, path))}"
    if kind == "extra_forbidden":
        if alias := _find_alias(detail, path, model):
            return f"is not a field of this API; did you mean {alias}?"
        known = _fields_at(model, path[:-1])
        remedy = f"; {suggest(str(path[-1]), known)}" if known else ""
        return f"is not a known field{remedy}"
    if kind in LENGTHS:
        return LENGTHS[kind].format_map({**context, "length": len(detail["input"])})
    if kind in ("value_error", "assertion_error"):
        cause = context.get("error")
        # Our own validators raise InputError; the text of any other exception is a library's.
        return str(cause) if isinstance(cause, InputError) else "is not valid"
    requirement = REQUIREMENTS.get(kind)
    if requirement is None:
        return f"got {abbreviate(detail['input'])}, which is not valid here"
    return f"got {abbreviate(detail['input'])}, must be {requirement.format_map(context)}"


def _code(detail: ErrorDetails) -> str:
    if detail["type"] in ("missing", "union_tag_not_found"):
        return "missing_required_parameter"
    if detail["type"] == "extra_forbidden":
        return "unknown_parameter"
    return "invalid_type" if detail["type"].endswith("_type") else "invalid_value"


def _find_alias(
    detail: ErrorDetails, path: Sequence[str | int], model: type[BaseModel]
) -> str | None:
    """Return the field that has the meaning of an unknown one, which is of another API."""
    if detail["type"] != "extra_forbidden" or len(path) != 1:
        return None
    known = _fields_at(model, ())
    names = ALIASES.get(str(path[0]), ())
    return next((name for name in names if name.partition(".")[0] in known), None)


def _discriminator(detail: ErrorDetails) -> str:
    return str(detail.get("ctx", {}).get("discriminator", "type")).strip("'")


def _tags_at(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the values of the field that tells the members of a union apart, in order."""
    fields = [one.model_fields.get(str(path[-1])) for one in _models_at(model, path[:-1])]
    return sorted(repr(tag) for field in fields if field for tag in get_args(field.annotation))


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> set[str]:
    """Return the fields of the models that may stand at a path, without those that are refused."""
    return {
        field.alias or name
        for one in _models_at(model, path)
        for name, field in one.model_fields.items()
        if not any(isinstance(mark, Unsupported) for mark in field.metadata)
    }


def _models_at(model: type[BaseModel], path: Sequence[str | int]) -> set[type[BaseModel]]:
    models = {model}
    for part in path:
        if isinstance(part, str):
            annotations = [
                one.model_fields[part].annotation for one in models if part in one.model_fields
            ]
            models = {found for one in annotations for found in _models_in(one)}
    return models


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {found for argument in get_args(annotation) for found in _models_in(argument)}
