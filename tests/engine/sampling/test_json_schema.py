"""JSON schemas: what is accepted is obeyed by every output, what cannot be obeyed is refused."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.engine.sampling.one_of import DisjointnessProof
from qwen2vl.errors import InputError
from tests.engine.sampling.schemas import SchemaGenerator, is_valid
from tests.engine.sampling.test_grammar_matcher import matcher_of, nano, random_output


def outputs(schema: Any, num: int = 6, max_tokens: int = 150) -> list[Any]:
    """Return the parsed values of random outputs; those that are not complete are left out."""
    grammar = Grammar.json_schema(schema)
    texts = [random_output(nano(), matcher_of(grammar), seed, max_tokens) for seed in range(num)]
    return [json.loads(text) for text in texts if text is not None]


def refusal(schema: Any) -> str:
    """Return the error of a schema, at construction or at compilation."""
    with pytest.raises(InputError) as caught:
        matcher_of(Grammar.json_schema(schema))
    return str(caught.value)


# Every keyword ---------------------------------------------------------------------------------


def outputs_or_error(schema: Any) -> list[Any] | str:
    try:
        return outputs(schema, num=3)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("part", range(4))
def test_random_outputs_of_random_schemas_are_valid(part: int) -> None:
    num_accepted = num_valid = 0
    for seed in range(150 * part, 150 * (part + 1)):
        schema = SchemaGenerator(seed).draw()
        given = deepcopy(schema)
        values = outputs_or_error(schema)
        assert schema == given  # the caller's schema is not changed
        if isinstance(values, str):
            assert not any(raw in values for raw in ("\n", "coerce", "NoExtension", "json-schema:"))
            continue
        num_accepted += 1
        for value in values:
            assert is_valid(value, schema, schema), (schema, value)
            num_valid += 1
    assert num_accepted > 50
    assert num_valid > 100


ALL_KEYWORDS = (
    # Core and applicators.
    "$schema $id $ref $anchor $dynamicRef $dynamicAnchor $vocabulary $comment $defs prefixItems "
    "items contains additionalProperties properties patternProperties dependentSchemas "
    "propertyNames if then else allOf anyOf oneOf not unevaluatedItems unevaluatedProperties "
    # Validation, metadata, format and content.
    "type const enum multipleOf maximum exclusiveMaximum minimum exclusiveMinimum maxLength "
    "minLength pattern maxItems minItems uniqueItems maxContains minContains maxProperties "
    "minProperties required dependentRequired title description default deprecated readOnly "
    "writeOnly examples format contentEncoding contentMediaType contentSchema"
).split()
REFUSED_KEYWORDS = (
    "$anchor $dynamicRef $dynamicAnchor $vocabulary contains dependentSchemas propertyNames if "
    "then else not unevaluatedItems unevaluatedProperties uniqueItems maxContains minContains "
    "dependentRequired contentEncoding contentMediaType contentSchema"
).split()


@pytest.mark.parametrize("keyword", ALL_KEYWORDS)
def test_each_keyword_of_draft_2020_12_is_known_or_refused_by_name(keyword: str) -> None:
    message = ""
    try:
        Grammar.json_schema({"items": {keyword: object_for(keyword)}})
    except InputError as error:
        message = str(error)
    if keyword in REFUSED_KEYWORDS:
        assert message.startswith(f"JSON schema: #/items has the keyword '{keyword}', which is not")
    else:
        assert "has the keyword" not in message


def object_for(keyword: str) -> Any:
    return True if keyword == "uniqueItems" else {}


def test_keywords_without_effect_are_accepted() -> None:
    schema = {"uniqueItems": False, "unevaluatedProperties": True, "unevaluatedItems": True}
    assert Grammar.json_schema(schema).text == "{}"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "# has type 'strin', must be one or several of array, boolean"),
        ({"type": []}, "# has type [], must be"),
        ({"enum": []}, "# has enum [], must be a list of values"),
        ({"items": {"minLength": -1}}, "#/items has minLength -1, must be a whole number from 0"),
        ({"maxItems": 2**40}, "# has maxItems 1099511627776, must be a whole number from 0 to 100"),
        ({"exclusiveMinimum": True}, "# has exclusiveMinimum True, must be a number"),
        ({"multipleOf": 0}, "# has multipleOf 0, must be a number above 0"),
        ({"pattern": 3}, "# has pattern 3, must be a regular expression"),
        ({"required": "a"}, "# has required 'a', must be a list of names"),
        ({"anyOf": {}}, "# has anyOf {}, must be a list of schemas"),
        ({"format": "binary"}, "# has format 'binary', must be one of date, date-time, duration"),
        ({"additionalItems": False}, "# has 'additionalItems' without a list of items; use items"),
        ({"items": [{}], "prefixItems": [{}]}, "# has 'prefixItems' and a list of items; use one"),
        ({"items": {"$id": "x"}}, "#/items has '$id', which changes what a $ref means"),
        ({"const": "\ud800"}, "it holds half of a surrogate pair"),
        ({"const": 2**53}, "the number 9007199254740992 cannot be obeyed exactly; use whole"),
        ({"minimum": 123456789.12345678}, "the number 123456789.12345678 cannot be obeyed exactly"),
        ('{"maximum": 1e400}', "the number 1e400 cannot be obeyed exactly"),
        ('{"maximum": NaN}', "not valid JSON (NaN is not a JSON number)"),
    ],
)
def test_values_that_cannot_be_obeyed_are_refused(schema: Any, message: str) -> None:
    assert message in refusal(schema)


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({}, {"minimum": -(2**53) + 1, "maximum": 2**53 - 1}),
        ({"exclusiveMinimum": 3}, {"exclusiveMinimum": 3, "maximum": 2**53 - 1}),
        ({"maximum": 3}, {"minimum": -(2**53) + 1, "maximum": 3}),
        ({"multipleOf": 10**6}, {"multipleOf": 10**6}),
        ({"type": ["integer", "number"]}, {"type": ["integer", "number"]}),
    ],
)
def test_integers_are_bounded(given: Any, bounds: Any) -> None:
    schema = {"type": "integer", **given}
    assert json.loads(Grammar.json_schema(schema).text) == {**schema, **bounds}


def test_an_integer_ends_at_the_bound() -> None:
    grammar = Grammar.json_schema({"items": {"type": ["integer", "null"]}, "type": "array"})
    bracket, nine = (
        next(i for i in range(len(nano())) if nano().decode([i]) == text) for text in "[9"
    )
    matcher = matcher_of(grammar)
    matcher.accept_token(bracket)
    for _ in range(15):
        matcher.accept_token(nine)
    assert not matcher.token_mask()[nine]


# References ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#/$defs/a"}, "# has $ref '#/$defs/a', but there is no schema; define it"),
        ({"$ref": "http://a.example/b"}, "which is not inside this schema; copy the definition"),
        ({"$ref": "other.json#/a"}, "which is not inside this schema"),
        ({"$ref": "#/const", "const": {"not": {}}}, "but there is no schema"),
        ({"$ref": "#"}, "# has $ref '#', which leads back to itself; put a property"),
        (
            {"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
            "#/$defs/a has $ref '#/$defs/a', which leads back to itself",
        ),
        (
            {
                "$defs": {"a": {"items": {"$ref": "#/$defs/a", "minItems": 1}, "type": "array"}},
                "items": {"$ref": "#/$defs/a", "minItems": 2},
            },
            "the recursive $ref '#/$defs/a' has other keywords beside it",
        ),
    ],
)
def test_references_that_cannot_be_resolved_are_refused(schema: Any, message: str) -> None:
    assert message in refusal(schema)


@pytest.mark.parametrize("name", ["a b", "a~b/c", "50%", "\u00e9"])
def test_references_may_be_quoted_or_not(name: str) -> None:
    pointer = name.replace("~", "~0").replace("/", "~1").replace("%", "%25")
    for step in (pointer, pointer.replace(" ", "%20")):
        assert set(outputs({"$ref": f"#/$defs/{step}", "$defs": {name: {"const": 5}}})) == {5}


def test_recursive_values_are_generated() -> None:
    tree = {
        "type": "object",
        "properties": {"left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["left"],
    }
    assert {"left": None} in outputs(tree)
    assert any(value["left"] for value in outputs(tree))


# Objects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"maxProperties": 3}]},
        {"allOf": [{"$ref": "#/$defs/D"}], "$defs": {"D": {"properties": {"a": {}}}}},
    ],
)
def test_objects_whose_properties_are_listed_once_are_closed(schema: dict[str, Any]) -> None:
    assert '"additionalProperties": false' in Grammar.json_schema(schema).text


def test_other_objects_of_the_schema_are_closed_beside_a_merged_one() -> None:
    part = {"type": "object", "properties": {"a": {}}}
    schema = {
        "properties": {"merged": {"allOf": [part, {"$ref": "#/$defs/D"}]}, "single": part},
        "$defs": {"D": {"properties": {"b": {}}}},
    }
    closed = {**part, "additionalProperties": False}
    assert json.loads(Grammar.json_schema(schema).text) == {
        "properties": {"merged": schema["properties"]["merged"], "single": closed},
        "$defs": schema["$defs"],
        "additionalProperties": False,
    }


def test_properties_that_are_listed_in_several_places_are_all_allowed() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "anyOf": [{"properties": {"b": {"const": 2}}, "required": ["b"]}],
        "required": ["a"],
        "maxProperties": 2,
    }
    assert {"a": 1, "b": 2} in outputs({k: v for k, v in schema.items() if k != "maxProperties"})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2},
            "has maxProperties, which is not supported together with optional properties; require",
        ),
        (
            {"patternProperties": {"^a": {}}, "minProperties": 2},
            "has minProperties 2, but names that are not listed in properties could repeat",
        ),
        (
            {"properties": {"a": {}}, "additionalProperties": {}, "minProperties": 1},
            "has minProperties, which is not supported together with optional properties",
        ),
    ],
)
def test_property_counts_that_cannot_be_obeyed_are_refused(schema: Any, message: str) -> None:
    assert message in refusal({"type": "object", **schema})


def test_property_counts_are_obeyed() -> None:
    nothing = {"type": "null"}
    for schema in (
        {"patternProperties": {"^[ab]$": nothing}, "minProperties": 1, "maxProperties": 2},
        {"properties": {"a": nothing, "b": nothing}, "minProperties": 1},
        {"properties": {"a": nothing, "b": nothing}, "required": ["a"], "maxProperties": 2},
    ):
        closed = {"type": "object", "additionalProperties": False, **schema}
        values = outputs(closed)
        assert values
        assert all(is_valid(value, closed, closed) for value in values)


# oneOf -----------------------------------------------------------------------------------------


def tagged(tag: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": tag}, **properties}}


def required(schema: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**schema, "required": list(names)}


DISJOINT = [
    ({"type": "string"}, {"type": ["integer", "null"]}),
    ({"const": 1}, {"enum": [2, "1", True]}),
    ({"type": "integer"}, {"const": 1.5}),
    ({"type": "number", "maximum": 1}, {"type": "integer", "exclusiveMinimum": 1}),
    ({"type": "string", "maxLength": 2}, {"type": "string", "minLength": 3}),
    (required(tagged("a"), "kind"), tagged("b")),
    (required(tagged("a"), "kind"), {"type": "object", "additionalProperties": False}),
    (False, {}),
    ({"anyOf": [{"const": 1}, {"const": 2}]}, {"oneOf": [{"const": 3}, {"type": "null"}]}),
    ({"allOf": [{"type": "string"}, {"minLength": 2}]}, {"const": None}),
]
NOT_DISJOINT = [
    ({"type": "number"}, {"type": "integer"}),
    ({"const": 1}, {"const": 1.0}),
    ({"enum": [1, 2]}, {"enum": [2, 3]}),
    (tagged("a"), tagged("b")),  # {} fits both
    ({"properties": {"k": {"const": 1}}, "required": ["k"]}, {"properties": {"k": {"const": 2}}}),
    ({"type": "integer", "maximum": 1}, {"type": "integer", "minimum": 1}),
    (True, {"type": "string"}),
]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(*pair, True) for pair in DISJOINT] + [(*pair, False) for pair in NOT_DISJOINT],
)
def test_disjointness_is_proven_only_if_it_holds(first: Any, second: Any, expected: bool) -> None:
    assert DisjointnessProof({}, {}).prove(first, second) is expected
    assert DisjointnessProof({}, {}).prove(second, first) is expected


def test_recursive_schemas_are_compared_in_finite_time() -> None:
    first = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
    assert not DisjointnessProof(first, first).prove(first, first)
    assert DisjointnessProof(first, {}).prove({"type": "null"}, {"type": "string"})


def test_branches_that_one_value_fits_are_refused_with_the_remedy() -> None:
    message = refusal({"items": {"oneOf": [{"type": "number"}, {"const": "a"}, {"minimum": 3}]}})
    assert message == (
        "JSON schema: #/items/oneOf has branches 0 and 2, which one value could fit both; give "
        "each a required property with a const of its own, or use anyOf"
    )


def test_branches_are_compared_with_the_schemas_as_given() -> None:
    # {"a": 1} fits the second branch as given, though not once its objects are closed.
    open_branches = [
        {"type": "object", "properties": {"a": {}}, "required": ["a"]},
        {"type": "object", "properties": {"b": {}}},
    ]
    assert "has branches 0 and 1" in refusal({"oneOf": open_branches})
    open_branches[1]["required"] = ["b"]
    schema = {"oneOf": open_branches}
    assert all(is_valid(value, schema, schema) for value in outputs(schema))


def test_too_many_branches_are_refused() -> None:
    message = refusal({"oneOf": [{"const": i} for i in range(1_000)]})
    assert message.startswith("JSON schema: oneOf has too many or too large branches to compare")


def test_one_of_beside_any_of_is_obeyed() -> None:
    schema = {
        "anyOf": [{"const": 1}, {"const": "a"}],
        "oneOf": [{"type": "integer"}, {"type": "null"}],
    }
    assert set(outputs(schema)) == {1}


# Discriminated unions of pydantic ---------------------------------------------------------------

# model_json_schema() of pydantic 2: the tag of Cat has a default, so it is not listed as required.
UNION = {
    "$defs": {
        "Cat": tagged("cat", lives={"type": "integer", "minimum": 0, "maximum": 9}),
        "Dog": required(
            tagged("dog", friend={"anyOf": [{"$ref": "#/$defs/Pet"}, {"type": "null"}]}), "kind"
        ),
        "Pet": {
            "discriminator": {
                "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"},
                "propertyName": "kind",
            },
            "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        },
    },
    "$ref": "#/$defs/Pet",
    "title": "Pet",
}


class ModelClass:
    """Stands for a pydantic model class."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return deepcopy(UNION)


class Adapter:
    """Stands for a pydantic TypeAdapter."""

    def json_schema(self) -> dict[str, Any]:
        return deepcopy(UNION)


@pytest.mark.parametrize("source", [UNION, json.dumps(UNION), ModelClass, ModelClass(), Adapter()])
def test_discriminated_unions_are_obeyed_from_every_source(source: Any) -> None:
    values = outputs(source, num=10)
    assert {value["kind"] for value in values} == {"cat", "dog"}
    assert all(is_valid(value, UNION, UNION) for value in values)


def test_models_of_pydantic_are_accepted() -> None:
    pydantic = pytest.importorskip("pydantic", reason="pydantic is no dependency")
    model = pydantic.create_model(
        "Shape", sides=(int, pydantic.Field(ge=3, le=9)), color=(str | None, None)
    )
    values = outputs(pydantic.TypeAdapter(list[model]), num=12) + [[v] for v in outputs(model)]
    assert any(values)
    assert all(3 <= model.model_validate(item).sides <= 9 for value in values for item in value)


class FailingModel:
    """Has a type without a JSON schema."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        raise RuntimeError("no schema for Callable\nsee the manual")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FailingModel, "failed (no schema for Callable); use types that have a JSON schema"),
        (
            5,
            "got 5, must be a mapping, JSON text, a pydantic model class or a pydantic TypeAdapter",
        ),
        (None, "got None, must be a mapping"),
        (b"{}", "got b'{}', must be a mapping"),
        (int, "got <class 'int'>, must be a mapping"),
        ([{}], "got [{}], must be a mapping"),
    ],
)
def test_other_sources_are_refused(source: Any, message: str) -> None:
    assert message in refusal(source)
