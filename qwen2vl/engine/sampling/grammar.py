"""Structured output: grammars from a JSON schema, regex, choice, Lark grammar, or boxes.

A `Grammar` is plain data. Its size and its schema keywords are checked on construction; other
errors are found when grammar_matcher.py compiles it for a tokenizer. Schemas are enforced
completely or rejected: an unsupported keyword is an error, unless it is an annotation. JSON output
is one line with ", " and ": ", as Python writes it, so that most punctuation is forced
(jump-forward).
(Lark: the syntax of llguidance, in which <|box_start|> is a special token.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwen2vl.errors import InputError
from qwen2vl.grounding import BOX_END, BOX_START, REF_END, REF_START

__all__ = ["Grammar"]

MAX_SCHEMA_CHARS = 32_768
MAX_SCHEMA_DEPTH = 32
MAX_REGEX_CHARS = 8_192
MAX_LARK_CHARS = 32_768
MAX_CHOICES = 1_000
MAX_CHOICE_CHARS = 1_000

_ANNOTATION_KEYWORDS = frozenset(
    "$schema $id $comment title description default examples deprecated readOnly writeOnly".split()
)
_SUPPORTED_KEYWORDS = frozenset(
    "$ref $defs definitions type enum const anyOf oneOf allOf "
    "minLength maxLength pattern format "
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf "
    "items prefixItems additionalItems minItems maxItems "
    "properties patternProperties additionalProperties required minProperties maxProperties".split()
)
_NAMED_SUBSCHEMA_KEYWORDS = ("properties", "patternProperties", "$defs", "definitions")
_SUBSCHEMA_KEYWORDS = ("items", "prefixItems", "additionalItems", "additionalProperties")
_SUBSCHEMA_KEYWORDS += ("anyOf", "oneOf", "allOf")

# One or more boxes, each with an optional phrase, optionally separated by line breaks.
_BOXES_GRAMMAR = rf"""
start: item ("\n"? item)*
item: ({REF_START} /[^\n]{{1,200}}/ {REF_END})? {BOX_START} POINT "," POINT {BOX_END}
POINT: /\((0|[1-9][0-9]{{0,2}}),(0|[1-9][0-9]{{0,2}})\)/
"""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar of the whole output text; create it with one of the class methods."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """Allow the JSON values of a schema, given as a mapping or as JSON text.

        Objects may have only the properties listed, unless the schema says otherwise
        (`additionalProperties`, `patternProperties`) or uses `allOf`: if further properties are
        always allowed, a model may never end the object.

        Raises:
            InputError: invalid JSON, too large or too deeply nested, or an unsupported keyword.
        """
        parsed, text = _parse_schema(schema)
        if len(text) > MAX_SCHEMA_CHARS:
            raise InputError(
                f"JSON schema: {len(text):,} characters, at most {MAX_SCHEMA_CHARS:,} are allowed"
            )
        _check_schema(parsed, "#", 0)
        if not _has_all_of(parsed):
            _forbid_additional_properties(parsed)
        return cls("json_schema", json.dumps(parsed))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Allow full matches of a regular expression without look-around and back-references.

        Raises:
            InputError: not a string, empty, or too long.
        """
        return cls("regex", _check_length("regex", pattern, MAX_REGEX_CHARS))

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """Allow exactly one of several texts.

        Raises:
            InputError: no or too many texts, or one that is empty or too long.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise InputError(f"choice: got {_abbreviate(texts)}, must be a list of texts")
        if len(texts) > MAX_CHOICES:
            raise InputError(f"choice: got {len(texts):,} texts, at most {MAX_CHOICES:,} allowed")
        for text in texts:
            _check_length("choice", text, MAX_CHOICE_CHARS)
        literals = (json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
        return cls("lark", "start: " + " | ".join(literals))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Allow the language of a context-free grammar with the start symbol `start`.

        Raises:
            InputError: not a string, empty, or too long.
        """
        return cls("lark", _check_length("grammar", text, MAX_LARK_CHARS))

    @classmethod
    def boxes(cls) -> Grammar:
        """Allow one or more bounding boxes in the model's format (Qwen2-VL sec. 2.2.1).

        `<|object_ref_start|>phrase<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`; the
        phrase and a line break between two boxes are optional; coordinates are 0 to 999.
        """
        return cls("lark", _BOXES_GRAMMAR)


def _check_length(name: str, text: str, limit: int) -> str:
    if not isinstance(text, str) or not text:
        raise InputError(f"{name}: got {_abbreviate(text)}, must be a text that is not empty")
    if len(text) > limit:
        raise InputError(f"{name}: {len(text):,} characters, at most {limit:,} are allowed")
    return text


def _parse_schema(schema: Mapping[str, Any] | str) -> tuple[dict[str, Any], str]:
    """Return a schema as parsed JSON and as JSON text, given either."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        parsed = json.loads(text)
    except RecursionError:
        raise InputError(f"JSON schema: nested deeper than {MAX_SCHEMA_DEPTH}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"JSON schema: not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise InputError(f"JSON schema: got {_abbreviate(parsed)}, must be a JSON object")
    return parsed, text


def _check_schema(schema: Any, where: str, depth: int) -> None:
    """Check a schema and its subschemas recursively; `where` is its JSON pointer, for errors."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise InputError(f"JSON schema: {where} is {_abbreviate(schema)}, must be a schema")
    if depth > MAX_SCHEMA_DEPTH:
        raise InputError(f"JSON schema: {where[:60]}... is nested deeper than {MAX_SCHEMA_DEPTH}")
    if unknown := [
        keyword for keyword in schema if keyword not in _ANNOTATION_KEYWORDS | _SUPPORTED_KEYWORDS
    ]:
        raise InputError(
            f"JSON schema: {where} has the keyword {_abbreviate(unknown[0])}, "
            "which is not supported"
        )
    for pointer, child in _subschemas(schema):
        _check_schema(child, f"{where}/{pointer}", depth + 1)


def _has_all_of(schema: Any) -> bool:
    """Return whether a schema or a subschema uses allOf, whose parts each list properties."""
    if not isinstance(schema, dict):
        return False
    return "allOf" in schema or any(_has_all_of(child) for _, child in _subschemas(schema))


def _forbid_additional_properties(schema: Any) -> None:
    """Set additionalProperties to false in all objects that list properties, in place."""
    if not isinstance(schema, dict):
        return
    if "properties" in schema and not {"additionalProperties", "patternProperties"} & set(schema):
        schema["additionalProperties"] = False
    for _, child in _subschemas(schema):
        _forbid_additional_properties(child)


def _subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword in _NAMED_SUBSCHEMA_KEYWORDS:
        named = schema.get(keyword, {})
        if not isinstance(named, dict):
            raise InputError(f"JSON schema: {keyword} is {_abbreviate(named)}, must be an object")
        yield from ((f"{keyword}/{name}", child) for name, child in named.items())
    for keyword in _SUBSCHEMA_KEYWORDS:
        value = schema.get(keyword, [])
        if isinstance(value, list):
            yield from ((f"{keyword}/{i}", child) for i, child in enumerate(value))
        else:
            yield keyword, value


def _abbreviate(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
