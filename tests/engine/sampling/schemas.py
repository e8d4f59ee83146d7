"""Random JSON schemas, and a validator written from the specification alone.

The validator follows JSON Schema draft 2020-12 (validation, sec. 6; core, sec. 10) and supports the
keywords that `Grammar.json_schema` accepts, without formats.
"""

from __future__ import annotations

import random
import re
from fractions import Fraction
from typing import Any

TYPES = ["null", "boolean", "number", "string", "array", "object"]
NAMES = ("a", "b", "ab", "x_1")
PATTERNS = ("^a", "b$", "^[ab]{1,3}$", "a|b", "^x_", "[0-9]")
SCALARS = (0, 1, 2, -1, 1.5, 10, "a", "b", "ab", "", None, True, False, [1], {"a": 1}, [], {})


# Validation ------------------------------------------------------------------------------------


def is_valid(value: Any, schema: Any, root: Any) -> bool:
    """Return whether a parsed JSON value is valid against a schema of the document `root`."""
    if isinstance(schema, bool):
        return schema
    return (
        check_in_place(value, schema, root)
        and check_values(value, schema)
        and all(
            check(value, schema, root) for kind, check in CHECKS.items() if has_type(value, kind)
        )
    )


def check_in_place(value: Any, schema: Any, root: Any) -> bool:
    fits = {
        keyword: [is_valid(value, part, root) for part in schema[keyword]]
        for keyword in ("allOf", "anyOf", "oneOf")
        if keyword in schema
    }
    return (
        ("$ref" not in schema or is_valid(value, resolve(schema["$ref"], root), root))
        and all(fits.get("allOf", ()))
        and any(fits.get("anyOf", [True]))
        and sum(fits.get("oneOf", [True])) == 1
    )


def check_values(value: Any, schema: Any) -> bool:
    types = schema.get("type", TYPES)
    return (
        any(has_type(value, name) for name in (types if isinstance(types, list) else [types]))
        and ("const" not in schema or equal(value, schema["const"]))
        and ("enum" not in schema or any(equal(value, other) for other in schema["enum"]))
    )


def resolve(reference: str, root: Any) -> Any:
    for step in reference.split("/")[1:]:
        root = root[step]
    return root


def has_type(value: Any, name: str) -> bool:
    if isinstance(value, bool) or value is None:
        return name == ("null" if value is None else "boolean")
    if isinstance(value, (int, float)):
        return name == "number" or (name == "integer" and float(value).is_integer())
    return name == {str: "string", list: "array", dict: "object"}[type(value)]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    return one == other


def check_number(value: float, schema: Any, root: Any) -> bool:
    return (
        value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        and ("multipleOf" not in schema or is_multiple(value, schema["multipleOf"]))
    )


def is_multiple(value: float, factor: float) -> bool:
    if isinstance(value, float) and abs(value) > 2**53:
        return True  # its last digits were lost when it was parsed
    return Fraction(str(value)) % Fraction(str(factor)) == 0


def check_string(value: str, schema: Any, root: Any) -> bool:
    size = len(value)
    return schema.get("minLength", 0) <= size <= schema.get("maxLength", size) and (
        "pattern" not in schema or re.search(schema["pattern"], value) is not None
    )


def check_array(value: list[Any], schema: Any, root: Any) -> bool:
    size, prefix = len(value), schema.get("prefixItems", [])
    return (
        schema.get("minItems", 0) <= size <= schema.get("maxItems", size)
        and all(is_valid(item, part, root) for item, part in zip(value, prefix, strict=False))
        and all(is_valid(item, schema.get("items", True), root) for item in value[len(prefix) :])
    )


def check_object(value: dict[str, Any], schema: Any, root: Any) -> bool:
    size = len(value)
    if not schema.get("minProperties", 0) <= size <= schema.get("maxProperties", size):
        return False
    if not set(schema.get("required", ())) <= set(value):
        return False
    for name, item in value.items():
        parts = [schema["properties"][name]] if name in schema.get("properties", {}) else []
        patterns = schema.get("patternProperties", {}).items()
        parts += [part for pattern, part in patterns if re.search(pattern, name)]
        parts = parts or [schema.get("additionalProperties", True)]
        if not all(is_valid(item, part, root) for part in parts):
            return False
    return True


CHECKS = {
    "number": check_number,
    "string": check_string,
    "array": check_array,
    "object": check_object,
}


# Random schemas --------------------------------------------------------------------------------


class SchemaGenerator:
    """Draws schemas of up to three levels from all supported keywords, many unsatisfiable."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def draw(self) -> dict[str, Any]:
        schema = self._schema(0)
        schema = schema if isinstance(schema, dict) else {}
        return {**schema, "$defs": {"D": self._schema(1)}}

    def _schema(self, depth: int) -> dict[str, Any] | bool:
        if self._chance(0.04) and depth:
            return self._chance(0.5)
        kinds = ["string", "integer", "number", "boolean", "null", "object", "array"]
        kind = self.rng.choice(kinds if depth < 3 else kinds[:5])
        schema: dict[str, Any] = {}
        if self._chance(0.85):
            schema["type"] = kind if self._chance(0.9) else sorted({kind, "null", "string"})
        schema |= getattr(self, f"_{kind}", lambda _: {})(depth)
        if self._chance(0.05):
            schema["const"] = self.rng.choice(SCALARS)
        if self._chance(0.08):
            schema["enum"] = self.rng.sample(SCALARS, 3)
        if self._chance(0.1):
            schema["$ref"] = "#/$defs/D"
        for keyword, chance in (("anyOf", 0.1), ("oneOf", 0.1), ("allOf", 0.05)):
            if depth < 2 and self._chance(chance):
                schema[keyword] = [self._schema(depth + 1) for _ in range(2)]
        return schema

    def _chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def _some(self, **values: Any) -> dict[str, Any]:
        """Keep each keyword with probability 0.4."""
        return {name: value for name, value in values.items() if self._chance(0.4)}

    def _string(self, depth: int) -> dict[str, Any]:
        low, pattern = self.rng.randint(0, 2), self.rng.choice(PATTERNS)
        return self._some(minLength=low, maxLength=self.rng.randint(1, 5), pattern=pattern)

    def _number(self, depth: int) -> dict[str, Any]:
        low, high = self.rng.choice((0, -3, 0.5, 2, -7.5)), self.rng.choice((5, 3.5, 1, 20, 123.25))
        factor = self.rng.choice((1, 2, 0.5, 0.1, 7, 1.5))
        return self._some(
            minimum=low,
            maximum=high,
            exclusiveMinimum=low - 1,
            exclusiveMaximum=high,
            multipleOf=factor,
        )

    _integer = _number

    def _array(self, depth: int) -> dict[str, Any]:
        return {"maxItems": self.rng.randint(0, 4)} | self._some(
            prefixItems=[self._schema(depth + 1) for _ in range(self.rng.randint(1, 2))],
            items=self._schema(depth + 1),
            minItems=self.rng.randint(0, 3),
        )

    def _object(self, depth: int) -> dict[str, Any]:
        names = self.rng.sample(NAMES, self.rng.randint(1, 3))
        schema = self._some(
            patternProperties={self.rng.choice(PATTERNS): self._schema(depth + 1)},
            additionalProperties=self._chance(0.3) and self._schema(depth + 1),
            required=self.rng.sample(names, self.rng.randint(0, len(names))),
        )
        if self._chance(0.7):
            schema["properties"] = {name: self._schema(depth + 1) for name in names}
        if self._chance(0.3):
            schema["minProperties"] = self.rng.randint(0, 2)
        if self._chance(0.3):
            schema["maxProperties"] = self.rng.randint(0, 3)
        return schema
