"""Fields of structured output: which grammar they make, and that there is only one."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qwen2vl.engine import Grammar
from qwen2vl.errors import InputError
from qwen2vl.server.protocol.structured_output import StructuredOutputFields

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ANY = Grammar.json_schema({"type": "object", "additionalProperties": True})


def parse(**body: Any) -> StructuredOutputFields:
    return StructuredOutputFields.model_validate(body)


def schema_format(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, **fields}}


@pytest.mark.parametrize(
    ("body", "path", "grammar"),
    [
        ({}, None, None),
        ({"response_format": {"type": "text"}}, None, None),
        ({"structured_outputs": {}}, None, None),
        ({"response_format": {"type": "json_object"}}, "response_format", ANY),
        (
            {"response_format": schema_format(strict=True, description="x")},
            "response_format.json_schema.schema",
            Grammar.json_schema(SCHEMA),
        ),
        (
            {"structured_outputs": {"json": SCHEMA}},
            "structured_outputs.json",
            Grammar.json_schema(SCHEMA),
        ),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object", ANY),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex", Grammar.regex("a")),
        ({"guided_json": '{"type": "null"}'}, "guided_json", Grammar.json_schema({"type": "null"})),
        ({"guided_choice": ["a", "b"]}, "guided_choice", Grammar.choice(["a", "b"])),
        ({"guided_grammar": 'start: "a"'}, "guided_grammar", Grammar.lark('start: "a"')),
    ],
)
def test_grammars(body: dict[str, Any], path: str | None, grammar: Grammar | None) -> None:
    fields = parse(**body)
    assert fields.grammar_path == path
    assert fields.constrains_output is (path is not None)
    assert fields.grammar() == grammar


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        (
            {"structured_outputs": {"regex": "a", "grammar": "b"}},
            "structured_outputs.grammar",
        ),
        (
            {"response_format": schema_format(schema={"type": "object", "if": {}})},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_regex": ""}, "guided_regex"),
    ],
)
def test_refusals_name_the_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as info:
        parse(**body).grammar()
    assert info.value.param == param


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({"response_format": {"type": "xml"}}, ("response_format",)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            ("response_format", "json_schema", "json_schema", "schema"),
        ),
        ({"response_format": {"type": "text", "x": 1}}, ("response_format", "text", "x")),
        ({"guided_choice": ["a"] * 1001}, ("guided_choice",)),
        ({"structured_outputs": {"structural_tag": "x"}}, ("structured_outputs", "structural_tag")),
    ],
)
def test_malformed_fields(body: dict[str, Any], loc: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as info:
        parse(**body)
    assert info.value.errors()[0]["loc"] == loc
