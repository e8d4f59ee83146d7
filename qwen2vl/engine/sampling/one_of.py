"""Proof that two JSON schemas have no value in common, so that their oneOf equals anyOf.

The proof is incomplete and sound: True is certain, False means not proven. Compared are types,
const and enum, ranges of numbers and lengths, and the properties that one of the two objects
requires: their values (the discriminator of a union), or that the other object forbids them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from qwen2vl.engine.sampling.json_schema import Schema, find_schema
from qwen2vl.errors import InputError

__all__ = ["DisjointnessProof"]

MAX_STEPS = 100_000  # schemas read in all comparisons of a document, which take about a second

_ALL_TYPES = frozenset("null boolean integer fraction string array object".split())
# Keywords of the range of each type: lower and upper bound, exclusive lower and upper bound.
_RANGES: Mapping[str, tuple[str, ...]] = {
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "fraction": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "string": ("minLength", "maxLength"),
    "array": ("minItems", "maxItems"),
    "object": ("minProperties", "maxProperties"),
}


class DisjointnessProof:
    """Compares schemas of one document with schemas of another, which may be a copy of it."""

    def __init__(self, first_root: Schema, second_root: Schema) -> None:
        """Set up for two documents, which must not change while schemas are compared."""
        self._roots = (first_root, second_root)
        # A pair that is being compared counts as not proven, which ends recursion.
        self._results: dict[tuple[int, int], bool] = {}
        self._num_steps = 0

    def prove(self, first: Any, second: Any) -> bool:
        """Return whether it is proven that no value fits both schemas.

        Raises:
            InputError: too many comparisons are needed.
        """
        if first is False or second is False:
            return True
        if first is True or second is True:
            return False
        key = (id(first), id(second))
        if key not in self._results:
            self._results[key] = False
            self._results[key] = self._compare(first, second)
        return self._results[key]

    def _compare(self, first: Schema, second: Schema) -> bool:
        all_first = list(_conjuncts(first, self._roots[0], set()))
        all_second = list(_conjuncts(second, self._roots[1], set()))
        self._num_steps += len(all_first) + len(all_second)
        if self._num_steps > MAX_STEPS:
            raise InputError(
                "JSON schema: oneOf has too many or too large branches to compare; use anyOf"
            )
        if any(
            all(self.prove(branch, second) for branch in schema[keyword])
            for schema in all_first
            for keyword in ("anyOf", "oneOf")
            if keyword in schema
        ) or any(
            all(self.prove(first, branch) for branch in schema[keyword])
            for schema in all_second
            for keyword in ("anyOf", "oneOf")
            if keyword in schema
        ):
            return True
        values, others = _values(all_first), _values(all_second)
        if values is not None and others is not None and not values & others:
            return True
        common = _types(all_first) & _types(all_second)
        return all(self._is_type_disjoint(kind, all_first, all_second) for kind in common)

    def _is_type_disjoint(self, kind: str, first: list[Schema], second: list[Schema]) -> bool:
        if kind in _RANGES and _is_empty_range([*first, *second], *_RANGES[kind]):
            return True
        return kind == "object" and self._are_objects_disjoint(first, second)

    def _are_objects_disjoint(self, first: list[Schema], second: list[Schema]) -> bool:
        required = {name for s in (*first, *second) for name in s.get("required", ())}
        return any(
            self.prove(one, other)
            for name in required
            for one in _property_schemas(first, name)
            for other in _property_schemas(second, name)
        )


def _conjuncts(schema: Any, root: Schema, seen: set[int]) -> Iterator[Schema]:
    """Yield the schemas that a value must fit all: itself, of its $ref and of its allOf."""
    if not isinstance(schema, dict) or id(schema) in seen:
        return
    seen.add(id(schema))
    yield schema
    if "$ref" in schema:
        yield from _conjuncts(find_schema(root, schema["$ref"]), root, seen)
    for part in schema.get("allOf", ()):
        yield from _conjuncts(part, root, seen)


def _property_schemas(schemas: list[Schema], name: str) -> list[Any]:
    """Return the schemas of a property; False if an object forbids it, True if any value fits."""
    found: list[Any] = []
    for schema in schemas:
        if name in schema.get("properties", {}):
            found.append(schema["properties"][name])
        elif schema.get("additionalProperties") is False and "patternProperties" not in schema:
            found.append(False)
    return found or [True]


def _values(schemas: list[Schema]) -> set[str] | None:
    """Return the values that const and enum allow, as JSON text; None if all are allowed."""
    allowed: set[str] | None = None
    for schema in schemas:
        for values in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
            if values is not None:
                texts = {_canonical(value) for value in values}
                allowed = texts if allowed is None else allowed & texts
    return allowed


def _canonical(value: Any) -> str:
    """Return a text that is the same for equal JSON values: 1 equals 1.0, but not true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_canonical, value))}]"
    if isinstance(value, dict):
        pairs = sorted((json.dumps(name), _canonical(item)) for name, item in value.items())
        return f"{{{', '.join(f'{name}: {item}' for name, item in pairs)}}}"
    return json.dumps(value)


def _types(schemas: list[Schema]) -> frozenset[str]:
    """Return the types that fit all schemas; numbers are divided into integer and fraction."""
    types = _ALL_TYPES
    for schema in schemas:
        if "type" in schema:
            given = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            types &= set(given) | ({"integer", "fraction"} if "number" in given else set())
        if "const" in schema:
            types &= {_type_of(schema["const"])}
        if "enum" in schema:
            types &= {_type_of(value) for value in schema["enum"]}
    return types


def _type_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, (int, float)):
        return "integer" if isinstance(value, int) or value.is_integer() else "fraction"
    return {str: "string", list: "array", dict: "object"}[type(value)]


def _is_empty_range(
    schemas: list[Schema],
    low_keyword: str,
    high_keyword: str,
    above_keyword: str = "",
    below_keyword: str = "",
) -> bool:
    low = max((s[low_keyword] for s in schemas if low_keyword in s), default=-math.inf)
    high = min((s[high_keyword] for s in schemas if high_keyword in s), default=math.inf)
    above = max((s[above_keyword] for s in schemas if above_keyword in s), default=-math.inf)
    below = min((s[below_keyword] for s in schemas if below_keyword in s), default=math.inf)
    return low > high or low >= below or above >= high or above >= below
