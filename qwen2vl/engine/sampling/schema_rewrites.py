"""Rewriting of a JSON schema for llguidance: unions, objects, counts of properties, integers.

`normalize_schema` removes annotations, requires the discriminators of discriminated unions, closes
objects that list their properties, bounds integers, and replaces oneOf by anyOf once one_of.py
proves that no value fits two branches. The result allows a subset of the values that the schema
given allows: whatever is generated is valid. What llguidance would not obey is refused.
(OpenAPI 3.1: discriminator.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from qwen2vl.engine.sampling.json_schema import (
    ANNOTATION_KEYWORDS,
    MAX_NUMBER,
    WITHOUT_EFFECT,
    Schema,
    SchemaPath,
    check_schema,
    find_schema,
    pointer_of,
    schema_error,
)
from qwen2vl.engine.sampling.one_of import DisjointnessProof
from qwen2vl.errors import InputError, abbreviate

__all__ = ["normalize_schema"]


def normalize_schema(schema: Schema) -> Schema:
    """Check a schema from `parse_schema` and rewrite it for llguidance.

    Raises:
        InputError: a keyword or its value cannot be obeyed; names it and its JSON pointer.
    """
    nodes = check_schema(schema)
    for node in nodes.values():
        _require_discriminator(schema, node)
    for node in nodes.values():
        for keyword in (ANNOTATION_KEYWORDS | set(WITHOUT_EFFECT)) & set(node):
            del node[keyword]
    as_given = deepcopy(schema)
    _close_objects(schema, list(nodes.values()))
    for node in nodes.values():
        _bound_integer(node)
    for path, node in nodes.items():
        _check_property_counts(path, node)
    proof = DisjointnessProof(schema, as_given)
    try:
        for path, node in nodes.items():
            _check_one_of(proof, as_given, path, node)
    except RecursionError:
        raise InputError(
            "JSON schema: oneOf leads through too many references to compare its branches; use "
            "anyOf"
        ) from None
    for node in nodes.values():  # after all proofs, which read oneOf
        _replace_one_of(node)
    return schema


def _require_discriminator(root: Schema, node: Schema) -> None:
    """Require the property of the `discriminator` keyword in every branch of its union.

    pydantic does not list it as required if it has a default; without it a value could fit two
    branches.
    """
    discriminator = node.get("discriminator")
    name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    if not isinstance(name, str):
        return
    for branch in (*node.get("oneOf", ()), *node.get("anyOf", ())):
        while isinstance(branch, dict) and "$ref" in branch:
            branch = find_schema(root, branch["$ref"])
        if isinstance(branch, dict) and name in branch.get("properties", {}):
            branch["required"] = list(dict.fromkeys([*branch.get("required", ()), name]))


def _close_objects(root: Schema, nodes: Sequence[Schema]) -> None:
    """Set additionalProperties to false in the objects whose properties are listed in one place."""
    merged = _merged_schemas(root, nodes)
    for node in nodes:
        is_decided = not {"additionalProperties", "patternProperties"}.isdisjoint(node)
        if "properties" in node and not is_decided and id(node) not in merged:
            node["additionalProperties"] = False


def _bound_integer(node: Schema) -> None:
    """Bound a schema of integers to those that float64 holds exactly: a digit may follow forever.

    Not with multipleOf, whose automaton grows with the divisor if there are bounds, and not a
    union with "number", to which they would apply too.
    """
    types = node.get("type")
    names = types if isinstance(types, list) else [types]
    if "integer" not in names or "number" in names or "multipleOf" in node:
        return
    if {"minimum", "exclusiveMinimum"}.isdisjoint(node):
        node["minimum"] = -MAX_NUMBER
    if {"maximum", "exclusiveMaximum"}.isdisjoint(node):
        node["maximum"] = MAX_NUMBER


def _merged_schemas(root: Schema, nodes: Sequence[Schema]) -> set[int]:
    """Return the ids of the schemas that list the properties of one object with others."""
    groups = {id(node): [*_in_place(root, node)] for node in nodes}
    # Schemas that list properties themselves, or through schemas that apply in place.
    listing = {id(node) for node in nodes if "properties" in node}
    num_known = -1
    while num_known < len(listing):
        num_known = len(listing)
        for node in reversed(nodes):  # subschemas first
            if any(id(part) in listing for group in groups[id(node)] for part in group):
                listing.add(id(node))
    merged: set[int] = set()
    pending = [
        node
        for node in nodes
        if ("properties" in node)
        + sum(any(id(part) in listing for part in group) for group in groups[id(node)])
        > 1
    ]
    while pending:
        node = pending.pop()
        if id(node) in groups and id(node) not in merged:  # else a boolean, or known
            merged.add(id(node))
            pending += [part for group in groups[id(node)] for part in group]
    return merged


def _in_place(root: Schema, node: Schema) -> Iterator[list[Any]]:
    """Yield the alternatives of each keyword that applies to the same value as its schema."""
    if "$ref" in node:
        yield [find_schema(root, node["$ref"])]
    yield from ([part] for part in node.get("allOf", ()))
    yield from (node[keyword] for keyword in ("anyOf", "oneOf") if keyword in node)


def _check_property_counts(path: SchemaPath, node: Schema) -> None:
    """Remove minProperties and maxProperties that always hold; refuse what llguidance cannot do.

    It counts only objects whose listed properties are all required, and it does not prevent that a
    name which is not listed is written twice.
    """
    required = set(node.get("required", ()))
    listed = {name for name, child in node.get("properties", {}).items() if child is not False}
    is_closed = node.get("additionalProperties") is False and not node.get("patternProperties")
    low, high = node.get("minProperties", 0), node.get("maxProperties", math.inf)
    if low <= len(required):
        node.pop("minProperties", None)
        low = 0
    if is_closed and high >= len(listed):
        node.pop("maxProperties", None)
        high = math.inf
    if low == 0 and high == math.inf:
        return
    if not is_closed and low > len(required) + 1:
        raise schema_error(
            path,
            f"has minProperties {low}, but names that are not listed in properties could repeat; "
            f"list and require them, or use minProperties {len(required) + 1}",
        )
    keyword = "maxProperties" if high < math.inf else "minProperties"
    if listed - required and (high < math.inf or low > 1 or not is_closed):
        raise schema_error(
            path,
            f"has {keyword}, which is not supported together with optional properties; require "
            f"{abbreviate(min(listed - required))}, or remove {keyword}",
        )


def _check_one_of(
    proof: DisjointnessProof, as_given: Schema, path: SchemaPath, node: Schema
) -> None:
    """Check that no value that is generated for one branch of oneOf fits another as given."""
    branches = find_schema(as_given, pointer_of(path)).get("oneOf", ())
    for i, generated in enumerate(node.get("oneOf", ())):
        for j, other in enumerate(branches):
            if i != j and not proof.prove(generated, other):
                raise schema_error(
                    (*path, "oneOf"),
                    f"has branches {min(i, j)} and {max(i, j)}, which one value could fit both; "
                    "give each a required property with a const of its own, or use anyOf",
                )


def _replace_one_of(node: Schema) -> None:
    branches = node.pop("oneOf", None)
    if branches is None:
        return
    if "anyOf" in node:
        node["allOf"] = [*node.get("allOf", ()), {"anyOf": branches}]
    else:
        node["anyOf"] = branches
