"""What an answer may look like: a JSON schema, a regular expression, a choice, a grammar, boxes.

A Grammar is plain data, checked for its size and its words when it is made; whether it can be
obeyed turns out when matcher.py compiles it for a tokenizer. Schemas are obeyed whole or refused:
a keyword that would be ignored is an error, unless it only describes. JSON is written on one line,
with ", " and ": " as Python writes it, so that most of its punctuation is forced and not asked for.
(Lark: the dialect of llguidance, where <|box_start|> is a special token.) Next room: matcher.py.
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

_DESCRIBING = frozenset(
    "$schema $id $comment title description default examples deprecated readOnly writeOnly".split()
)
_OBEYED = frozenset(
    "$ref $defs definitions type enum const anyOf oneOf allOf "
    "minLength maxLength pattern format "
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf "
    "items prefixItems additionalItems minItems maxItems "
    "properties patternProperties additionalProperties required minProperties maxProperties".split()
)
_HOLD_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_HOLD_SCHEMAS = ("items", "prefixItems", "additionalItems", "additionalProperties")
_HOLD_SCHEMAS += ("anyOf", "oneOf", "allOf")

# One or more boxes, each with a phrase or without; lists of them go line by line.
_BOXES = rf"""
start: item ("\n"? item)*
item: ({REF_START} /[^\n]{{1,200}}/ {REF_END})? {BOX_START} POINT "," POINT {BOX_END}
POINT: /\((0|[1-9][0-9]{{0,2}}),(0|[1-9][0-9]{{0,2}})\)/
"""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A rule for the whole text of an answer; made by the functions below, not by hand."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """Allow the JSON values of a schema, given as a mapping or as JSON text.

        An object has the properties it names and no others, unless the schema says otherwise
        (`additionalProperties`, `patternProperties`) or is put together by `allOf`: a model that
        may always add one more property finds no end.

        Raises:
            InputError: no JSON, too large or deep, or a keyword that is not obeyed here.
        """
        parsed, text = _parse_schema(schema)
        if len(text) > MAX_SCHEMA_CHARS:
            raise InputError(
                f"JSON schema: {len(text):,} characters, at most {MAX_SCHEMA_CHARS:,} are allowed"
            )
        _check_schema(parsed, "#", 0)
        if not _has_all_of(parsed):
            _close(parsed)
        return cls("json_schema", json.dumps(parsed))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Allow what a regular expression matches whole: no look-around, no back-references.

        Raises:
            InputError: no text, or too long.
        """
        return cls("regex", _bounded("regex", pattern, MAX_REGEX_CHARS))

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """Allow exactly one of several texts.

        Raises:
            InputError: none, too many, or one that is empty or too long.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise InputError(f"choice: got {_show(texts)}, must be a list of texts")
        if len(texts) > MAX_CHOICES:
            raise InputError(f"choice: got {len(texts):,} texts, at most {MAX_CHOICES:,} allowed")
        for text in texts:
            _bounded("choice", text, MAX_CHOICE_CHARS)
        literals = (json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
        return cls("lark", "start: " + " | ".join(literals))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Allow what a context-free grammar derives from `start`.

        Raises:
            InputError: no text, or too long.
        """
        return cls("lark", _bounded("grammar", text, MAX_LARK_CHARS))

    @classmethod
    def boxes(cls) -> Grammar:
        """Allow one or more boxes as the model was taught to write them (Qwen2-VL sec. 2.2.1).

        `<|object_ref_start|>phrase<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`, the
        phrase optional, a line break between two of them optional, numbers from 0 to 999.
        """
        return cls("lark", _BOXES)


def _bounded(name: str, text: str, limit: int) -> str:
    if not isinstance(text, str) or not text:
        raise InputError(f"{name}: got {_show(text)}, must be a text that is not empty")
    if len(text) > limit:
        raise InputError(f"{name}: {len(text):,} characters, at most {limit:,} are allowed")
    return text


def _parse_schema(schema: Mapping[str, Any] | str) -> tuple[dict[str, Any], str]:
    """Give a schema as plain values and as text, whichever of the two it came as."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        parsed = json.loads(text)
    except RecursionError:
        raise InputError(f"JSON schema: nested deeper than {MAX_SCHEMA_DEPTH}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"JSON schema: not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise InputError(f"JSON schema: got {_show(parsed)}, must be a JSON object")
    return parsed, text


def _check_schema(schema: Any, where: str, depth: int) -> None:
    """Walk a schema and the schemas in it; `where` is the pointer for errors."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise InputError(f"JSON schema: {where} is {_show(schema)}, must be a schema")
    if depth > MAX_SCHEMA_DEPTH:
        raise InputError(f"JSON schema: {where[:60]}... is nested deeper than {MAX_SCHEMA_DEPTH}")
    if unknown := [word for word in schema if word not in _DESCRIBING | _OBEYED]:
        raise InputError(
            f"JSON schema: {where} has the keyword {_show(unknown[0])}, which is not supported"
        )
    for pointer, child in _children(schema):
        _check_schema(child, f"{where}/{pointer}", depth + 1)


def _has_all_of(schema: Any) -> bool:
    """Tell whether parts that must hold together stand apart, each with properties of its own."""
    if not isinstance(schema, dict):
        return False
    return "allOf" in schema or any(_has_all_of(child) for _, child in _children(schema))


def _close(schema: Any) -> None:
    """Let objects have no other properties than those they name, in place."""
    if not isinstance(schema, dict):
        return
    if "properties" in schema and not {"additionalProperties", "patternProperties"} & set(schema):
        schema["additionalProperties"] = False
    for _, child in _children(schema):
        _close(child)


def _children(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for word in _HOLD_SCHEMAS_BY_NAME:
        named = schema.get(word, {})
        if not isinstance(named, dict):
            raise InputError(f"JSON schema: {word} is {_show(named)}, must be an object")
        yield from ((f"{word}/{name}", child) for name, child in named.items())
    for word in _HOLD_SCHEMAS:
        held = schema.get(word, [])
        if isinstance(held, list):
            yield from ((f"{word}/{i}", child) for i, child in enumerate(held))
        else:
            yield word, held


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
