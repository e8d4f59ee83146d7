"""Grammar construction: what is accepted, and what is rejected before compilation."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.errors import InputError


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_schema_may_be_text_or_a_mapping() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert Grammar.json_schema(schema) == Grammar.json_schema(json.dumps(schema))


def test_additional_properties_are_forbidden_unless_the_schema_allows_them() -> None:
    nested_schema: dict[str, Any] = {"type": "object", "properties": {"b": {}}}
    parsed = json.loads(Grammar.json_schema({"properties": {"a": nested_schema}}).text)
    assert parsed["additionalProperties"] is False
    assert parsed["properties"]["a"]["additionalProperties"] is False
    for open_schema in (
        {"properties": {"a": {}}, "additionalProperties": True},
        {"properties": {"a": {}}, "patternProperties": {"^x": {}}},
        {"type": "object"},
        {"allOf": [nested_schema, {"properties": {"c": {}}}]},
    ):
        assert json.loads(Grammar.json_schema(open_schema).text) == open_schema


def test_grammars_compare_and_hash() -> None:
    assert len({Grammar.boxes(), Grammar.boxes(), Grammar.regex("a"), Grammar.lark("a")}) == 3


def test_duplicate_choices_are_removed() -> None:
    assert Grammar.choice(["a", "b", "a"]) == Grammar.choice(("a", "b"))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"type":', "JSON schema: not valid JSON (Expecting value"),
        ("[1]", "JSON schema: got [1], must be a JSON object"),
        ("true", "JSON schema: got True, must be a JSON object"),
        ({"const": {1, 2}}, "JSON schema: not valid JSON (Object of type set"),
        ({"maximum": float("nan")}, "JSON schema: not valid JSON (Out of range"),
        ({"color": 3}, "JSON schema: # has the keyword 'color', which is not supported"),
        ({"nullable": True}, "'nullable', which is not supported"),
        ({"x-guidance": {"lenient": True}}, "'x-guidance', which is not supported"),
        ({"not": {}}, "'not', which is not supported"),
        (
            {"properties": {"a": {"items": [{}, {"if": {}}]}}},
            "#/properties/a/items/1 has the keyword 'if'",
        ),
        ({"$defs": {"a": {"foo": 1}}}, "#/$defs/a has the keyword 'foo'"),
        ({"additionalProperties": {"foo": 1}}, "#/additionalProperties has the keyword 'foo'"),
        ({"anyOf": [{}, {"foo": 1}]}, "#/anyOf/1 has the keyword 'foo'"),
        ({"properties": [1]}, "JSON schema: # has properties [1], must be an object of schemas"),
        ({"properties": {"a": 3}}, "JSON schema: #/properties/a is 3, must be a schema"),
        ({"enum": ["x" * 40_000]}, "characters, at most 32,768 are allowed"),
        (nested(33), "is nested deeper than 32"),
        (
            nested(100_000 if sys.version_info < (3, 12) else 5_000),
            # Python 3.13 encodes this depth, and the limit of length applies.
            "nested deeper than 32" if sys.version_info < (3, 13) else "at most 32,768 are allowed",
        ),
    ],
)
def test_invalid_schemas_are_rejected(schema: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Grammar.json_schema(schema)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_property_names_equal_to_keywords_are_allowed() -> None:
    Grammar.json_schema({"properties": {"not": {}, "foo": True}, "enum": [{"foo": 1}]})


def test_annotation_keywords_are_allowed() -> None:
    Grammar.json_schema({"title": "t", "description": "d", "default": 1, "examples": [1]})
    Grammar.json_schema(nested(32))


@pytest.mark.parametrize(
    ("constructor", "value", "message"),
    [
        (Grammar.regex, "", "regex: got '', must be a text that is not empty"),
        (Grammar.regex, None, "regex: got None"),
        (Grammar.regex, "a" * 8193, "regex: 8,193 characters, at most 8,192 are allowed"),
        (Grammar.choice, [], "choice: got [], must be a list of texts"),
        (Grammar.choice, "yes", "choice: got 'yes', must be a list of texts"),
        (Grammar.choice, ["yes", ""], "choice: got '', must be a text that is not empty"),
        (Grammar.choice, ["yes", 3], "choice: got 3"),
        (Grammar.choice, ["x" * 1001], "choice: 1,001 characters, at most 1,000 are allowed"),
        (Grammar.choice, ["x"] * 1001, "choice: got 1,001 texts, at most 1,000 allowed"),
        (Grammar.choice, {"yes"}, "choice: got {'yes'}, must be a list of texts"),
        (Grammar.choice, ["a", "\udc00"], "choice: the text holds half of a surrogate pair"),
        (Grammar.regex, "a\\\\\\", "regex: ends in a single backslash at character 4; write"),
        (Grammar.regex, "\ud800", "regex: the text holds half of a surrogate pair"),
        (Grammar.regex, b"a", "regex: got b'a', must be a text"),
        (Grammar.lark, 5, "grammar: got 5, must be a text that is not empty"),
        (Grammar.lark, "", "grammar: got ''"),
        (Grammar.lark, "a" * 40_000, "grammar: 40,000 characters, at most 32,768"),
    ],
)
def test_invalid_texts_are_rejected(constructor: Any, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        constructor(value)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("kind", "text"), [("json", "{}"), ("regex", None), (None, "a")])
def test_a_grammar_of_another_kind_is_rejected(kind: Any, text: Any) -> None:
    with pytest.raises(InputError, match=r"Grammar: got .*; create one with Grammar\.json_schema"):
        Grammar(kind, text)


def test_a_regex_may_end_in_an_escaped_backslash() -> None:
    assert Grammar.regex("a\\\\").text == "a\\\\"


def test_sampling_params_accept_only_a_grammar() -> None:
    assert SamplingParams(grammar=Grammar.boxes()).grammar == Grammar.boxes()
    with pytest.raises(InputError, match=r"grammar: got 'yes\|no', must be a Grammar"):
        SamplingParams(grammar="yes|no")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ignore_eos: with a grammar nothing can follow"):
        SamplingParams(grammar=Grammar.boxes(), ignore_eos=True)
