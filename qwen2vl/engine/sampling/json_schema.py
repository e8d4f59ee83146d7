"""JSON Schema (draft 2020-12) for constrained decoding: parse a schema and check its keywords.

A schema is a mapping, JSON text, or a model of pydantic. Every keyword is obeyed or refused with
its JSON pointer: `check_schema` checks the keywords, their values, and that each $ref points into
the schema. schema_rewrites.py then rewrites the schema for llguidance. (JSON Schema core, sec. 8 to
10; validation, sec. 6.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol
from urllib.parse import quote, unquote

from qwen2vl.errors import InputError, abbreviate

__all__ = [
    "ANNOTATION_KEYWORDS",
    "MAX_NUMBER",
    "MAX_SCHEMA_DEPTH",
    "WITHOUT_EFFECT",
    "Schema",
    "SchemaPath",
    "SchemaSource",
    "check_schema",
    "find_schema",
    "parse_schema",
    "patterns_of",
    "pointer_of",
    "schema_error",
]

MAX_SCHEMA_CHARS = 32_768
MAX_SCHEMA_DEPTH = 32
MAX_COUNT = 100_000  # of minLength, maxItems and the like: their cost grows with the number
# llguidance computes in float64 and prints 15 significant digits.
MAX_NUMBER = 2**53 - 1

Schema = dict[str, Any]
SchemaPath = tuple[str, ...]  # keywords, names and indices from the root to a schema


class _ModelClass(Protocol):
    def model_json_schema(self) -> dict[str, Any]: ...


class _Adapter(Protocol):
    def json_schema(self) -> dict[str, Any]: ...


SchemaSource = type[Any] | _ModelClass | _Adapter  # of pydantic: a model class, a TypeAdapter

ANNOTATION_KEYWORDS = frozenset(
    "$schema $id $comment title description default examples deprecated readOnly writeOnly "
    "discriminator".split()
)
# Keywords that are not supported, but accepted with the value that allows everything.
WITHOUT_EFFECT: Mapping[str, Any] = {
    "uniqueItems": False,
    "unevaluatedItems": True,
    "unevaluatedProperties": True,
}
_TYPES = frozenset("null boolean integer number string array object".split())
_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uri uuid".split())
_NAMED_SUBSCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SUBSCHEMA_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_SUBSCHEMAS = ("items", "additionalItems", "additionalProperties")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in _TYPES for name in names)


_Rule = tuple[Callable[[Any], bool], str]
_COUNT: _Rule = (_is_count, f"a whole number from 0 to {MAX_COUNT:,}")
_NUMBER: _Rule = (_is_number, "a number")
_OBJECT: _Rule = (lambda value: isinstance(value, dict), "an object of schemas")
_LIST: _Rule = (lambda value: isinstance(value, list) and bool(value), "a list of schemas")
_ANY: _Rule = (lambda value: True, "")

# What the value of each supported keyword must be; subschemas are checked as schemas.
_RULES: Mapping[str, _Rule] = {
    "$ref": (lambda value: isinstance(value, str), "a text such as '#/$defs/name'"),
    "type": (_is_type, f"one or several of {', '.join(sorted(_TYPES))}"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list of values"),
    "const": _ANY,
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _COUNT),
    **dict.fromkeys(("minProperties", "maxProperties"), _COUNT),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBER),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "pattern": (lambda value: isinstance(value, str), "a regular expression"),
    "format": (
        lambda value: isinstance(value, str) and value in _FORMATS,
        f"one of {', '.join(sorted(_FORMATS))}; leave it out, or use pattern",
    ),
    "required": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
    **dict.fromkeys(_NAMED_SUBSCHEMAS, _OBJECT),
    **dict.fromkeys(_SUBSCHEMA_LISTS, _LIST),
    **dict.fromkeys(_SUBSCHEMAS, _ANY),
}


def parse_schema(source: object) -> Schema:
    """Return the parsed schema of a mapping, JSON text, or an object of pydantic.

    Of pydantic are accepted what has `model_json_schema` (a model class) or `json_schema`
    (a TypeAdapter); pydantic itself is not imported.

    Raises:
        InputError: not a schema, not valid JSON, too large, or a number that cannot be obeyed.
    """
    method = getattr(source, "model_json_schema", None) or getattr(source, "json_schema", None)
    if callable(method):
        try:
            source = method()
        except Exception as error:  # of pydantic, or of any other class with such a method
            raise InputError(
                f"JSON schema: {abbreviate(method)} failed ({_first_line(error)}); use types that "
                "have a JSON schema"
            ) from error
    if not isinstance(source, (str, Mapping)):
        raise InputError(
            f"JSON schema: got {abbreviate(source)}, must be a mapping, JSON text, a pydantic "
            "model class or a pydantic TypeAdapter"
        )
    parsed = _load(source)
    if not isinstance(parsed, dict):
        raise InputError(f"JSON schema: got {abbreviate(parsed)}, must be a JSON object")
    return parsed


def check_schema(schema: Schema) -> dict[SchemaPath, Schema]:
    """Check a schema from `parse_schema`, and return it and all subschemas but booleans.

    Each $ref is written as a quoted JSON pointer, in place.

    Raises:
        InputError: a keyword or its value cannot be obeyed; names it and its JSON pointer.
    """
    all_nodes = dict(_check_nodes(schema))
    nodes = {path: node for path, node in all_nodes.items() if isinstance(node, dict)}
    for path, node in nodes.items():
        _resolve_reference(all_nodes, path, node)
    _check_loops(schema, nodes)
    return nodes


def patterns_of(schema: Schema) -> Iterator[tuple[str, str]]:
    """Yield each regular expression in a schema with the JSON pointer of its keyword."""
    for path, node in _walk(schema, ()):
        if isinstance(node, dict):
            if "pattern" in node:
                yield pointer_of((*path, "pattern")), node["pattern"]
            where = pointer_of((*path, "patternProperties"))
            yield from ((where, pattern) for pattern in node.get("patternProperties", ()))


# Parsing --------------------------------------------------------------------------------------


def _load(source: str | Mapping[str, Any]) -> Any:
    try:
        text = source if isinstance(source, str) else json.dumps(source, allow_nan=False)
        if len(text) > MAX_SCHEMA_CHARS:
            raise InputError(
                f"JSON schema: {len(text):,} characters, at most {MAX_SCHEMA_CHARS:,} are "
                "allowed; split it over several requests"
            )
        parsed = json.loads(
            text, parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_constant
        )
        json.dumps(parsed, ensure_ascii=False).encode()
    except InputError:
        raise
    except RecursionError:
        raise InputError(
            f"JSON schema: nested deeper than {MAX_SCHEMA_DEPTH}; use $ref for recursive values"
        ) from None
    except UnicodeEncodeError:
        raise InputError(
            "JSON schema: it holds half of a surrogate pair (U+D800 to U+DFFF), which is not a "
            "character; decode it properly first"
        ) from None
    except (ValueError, TypeError) as error:
        raise InputError(
            f"JSON schema: not valid JSON ({_first_line(error)}); give a schema as json.dumps "
            "writes it"
        ) from None
    return parsed


def _parse_int(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > MAX_NUMBER:
        raise InputError(
            f"JSON schema: the number {abbreviate(digits)[1:-1]} cannot be obeyed exactly; use "
            f"whole numbers up to {MAX_NUMBER:,}, or a string with a pattern"
        )
    return int(digits)


def _parse_float(digits: str) -> float:
    number = float(digits)
    if abs(number) > MAX_NUMBER or float(f"{number:.15g}") != number:
        raise InputError(
            f"JSON schema: the number {abbreviate(digits)[1:-1]} cannot be obeyed exactly; use "
            f"numbers up to {MAX_NUMBER:,} of at most 15 digits, or a string with a pattern"
        )
    return number


def _parse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


# Keywords -------------------------------------------------------------------------------------


def _check_nodes(schema: Schema) -> Iterator[tuple[SchemaPath, Schema | bool]]:
    """Check a schema and all subschemas, each before its own; yield them with their paths."""
    for where, node in _walk(schema, ()):
        if isinstance(node, bool):
            yield where, node
            continue
        if not isinstance(node, dict):
            raise schema_error(
                where, f"is {abbreviate(node)}, must be a schema (an object or a boolean)"
            )
        if _depth(where) > MAX_SCHEMA_DEPTH:
            raise schema_error(
                where, f"is nested deeper than {MAX_SCHEMA_DEPTH}; use $ref for recursive values"
            )
        for keyword, value in node.items():
            _check_keyword(where, node, keyword, value)
        yield where, node


def _check_keyword(path: SchemaPath, node: Schema, keyword: str, value: Any) -> None:
    if keyword == "$id" and path:
        raise schema_error(path, "has '$id', which changes what a $ref means; remove it")
    if keyword in ANNOTATION_KEYWORDS:
        return
    if keyword in WITHOUT_EFFECT and value is WITHOUT_EFFECT[keyword]:
        return
    if keyword not in _RULES:
        raise schema_error(
            path, f"has the keyword {abbreviate(keyword)}, which is not supported; remove it"
        )
    is_valid, rule = _RULES[keyword]
    if not is_valid(value):
        raise schema_error(path, f"has {keyword} {abbreviate(value)}, must be {rule}")
    if keyword == "additionalItems" and not isinstance(node.get("items"), list):
        raise schema_error(path, "has 'additionalItems' without a list of items; use items")
    if keyword == "items" and isinstance(value, list) and "prefixItems" in node:
        raise schema_error(path, "has 'prefixItems' and a list of items; use one schema as items")


def _walk(schema: Any, path: SchemaPath) -> Iterator[tuple[SchemaPath, Any]]:
    """Yield a schema and all subschemas with their paths, each before its subschemas."""
    yield path, schema
    if not isinstance(schema, dict):
        return
    for keyword in _NAMED_SUBSCHEMAS:
        for name, child in schema.get(keyword, {}).items():
            yield from _walk(child, (*path, keyword, name))
    for keyword in (*_SUBSCHEMA_LISTS, *_SUBSCHEMAS):
        value = schema.get(keyword, [])
        if isinstance(value, list):
            for i, child in enumerate(value):
                yield from _walk(child, (*path, keyword, str(i)))
        else:
            yield from _walk(value, (*path, keyword))


def _depth(path: SchemaPath) -> int:
    """Count the schemas around the schema at `path`."""
    depth = i = 0
    while i < len(path):
        single = path[i] in _SUBSCHEMAS and not (len(path) > i + 1 and path[i + 1].isdecimal())
        i += 1 if single else 2
        depth += 1
    return depth


# References -----------------------------------------------------------------------------------


def find_schema(root: Schema, reference: str) -> Any:
    """Return the schema of `root` that a $ref, which `check_schema` has accepted, points to."""
    value: Any = root
    for step in _path_of(reference):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def _path_of(reference: str) -> SchemaPath:
    steps = (unquote(step) for step in reference.split("/")[1:])
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in steps)


def _resolve_reference(
    nodes: Mapping[SchemaPath, Schema | bool], path: SchemaPath, node: Schema
) -> None:
    """Check that the $ref of a schema points to a schema of the same document; quote it."""
    if "$ref" not in node:
        return
    reference = node["$ref"]
    if reference != "#" and not reference.startswith("#/"):
        raise schema_error(
            path,
            f"has $ref {abbreviate(reference)}, which is not inside this schema; copy the "
            "definition into $defs and refer to '#/$defs/NAME'",
        )
    target = _path_of(reference)
    if target not in nodes:
        raise schema_error(
            path, f"has $ref {abbreviate(reference)}, but there is no schema; define it"
        )
    node["$ref"] = pointer_of(target)


def _check_loops(root: Schema, nodes: Mapping[SchemaPath, Schema]) -> None:
    """Refuse a schema that refers to itself alone, which would describe no value at all."""
    without_loop: set[int] = set()
    for path, start in nodes.items():
        chain: set[int] = set()
        node: Any = start
        while isinstance(node, dict) and "$ref" in node and id(node) not in without_loop:
            if id(node) in chain:
                raise schema_error(
                    path,
                    f"has $ref {abbreviate(start['$ref'])}, which leads back to itself; put a "
                    "property, an item or an alternative in between",
                )
            chain.add(id(node))
            node = find_schema(root, node["$ref"])
        without_loop |= chain


# Errors ---------------------------------------------------------------------------------------


def pointer_of(path: SchemaPath) -> str:
    """Return the JSON pointer of a path as a URI fragment, as it is written in $ref."""
    steps = (step.replace("~", "~0").replace("/", "~1") for step in path)
    return "/".join(("#", *(quote(step, safe="$~!*'()+,;=:@-._") for step in steps)))


def schema_error(path: SchemaPath, problem: str) -> InputError:
    """Return the error of the schema at a path."""
    pointer = "/".join(("#", *path))
    where = pointer if len(pointer) <= 60 else f"{pointer[:57]}..."
    return InputError(f"JSON schema: {where} {problem}")


def _first_line(error: Exception) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if len(text) <= 80 else f"{text[:77]}..."
