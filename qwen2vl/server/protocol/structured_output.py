"""Fields of structured output: response_format of OpenAI, structured_outputs and guided_* of vLLM.

A request may ask for one grammar. Schemas are enforced completely or refused, whatever `strict`
says; the checks themselves are those of `Grammar`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from qwen2vl.engine import Grammar
from qwen2vl.errors import InputError, abbreviate
from qwen2vl.server.protocol.sampling import RequestModel, Unsupported

__all__ = [
    "ANY_OBJECT",
    "JsonObjectFormat",
    "JsonSchemaFormat",
    "ResponseFormat",
    "StructuredOutputFields",
    "StructuredOutputs",
    "TextFormat",
]

MAX_NAME = 64
MAX_CHOICES = 1000

ANY_OBJECT = {"type": "object", "additionalProperties": True}


class JsonSchemaFormat(RequestModel):
    """The schema of response_format."""

    model_config = ConfigDict(extra="forbid", strict=True, serialize_by_alias=True)

    name: str | None = Field(default=None, max_length=MAX_NAME, description="Ignored.")
    description: str | None = Field(
        default=None, description="Ignored; describe the task in a message."
    )
    schema_: dict[str, Any] = Field(alias="schema", description="JSON Schema, draft 2020-12.")
    strict: bool | None = Field(default=None, description="Ignored: schemas are always enforced.")


class TextFormat(RequestModel):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaResponseFormat(RequestModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaResponseFormat, Field(discriminator="type")
]


class StructuredOutputs(RequestModel):
    """One constraint of the output. (vLLM: StructuredOutputsParams.)"""

    json_: Annotated[Any, Field(alias="json", description="JSON Schema, or its text.")] = None
    regex: str | None = Field(default=None, description="Regular expression of the whole output.")
    choice: Annotated[list[str], Field(max_length=MAX_CHOICES)] | None = None
    grammar: str | None = Field(default=None, description="Lark grammar in llguidance's syntax.")
    json_object: bool | None = None
    disable_fallback: Annotated[
        Any, Unsupported("there is no fallback; leave disable_fallback out", False, True)
    ] = None
    disable_any_whitespace: Annotated[
        Any, Unsupported("JSON is one line; leave disable_any_whitespace out", False)
    ] = None
    disable_additional_properties: Annotated[
        Any,
        Unsupported("give additionalProperties false in the schema", False),
    ] = None
    whitespace_pattern: Annotated[
        Any, Unsupported("JSON is one line; leave whitespace_pattern out")
    ] = None
    structural_tag: Annotated[
        Any, Unsupported("structural tags are not supported; give a grammar")
    ] = None


class StructuredOutputFields(RequestModel):
    """Fields of which at most one constrains the output."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[Any, Field(description="As structured_outputs.json.")] = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(max_length=MAX_CHOICES)] | None = None
    guided_grammar: str | None = Field(
        default=None, description="As structured_outputs.grammar, in Lark's syntax."
    )
    guided_whitespace_pattern: Annotated[
        Any, Unsupported("JSON is one line; leave guided_whitespace_pattern out")
    ] = None
    guided_decoding_backend: Annotated[Any, Field(description="Accepted and ignored.")] = None

    @property
    def constrains_output(self) -> bool:
        """Whether the request asks for any constraint."""
        return self.grammar_path is not None

    @property
    def grammar_path(self) -> str | None:
        """Path of the field that constrains the output; None for free text."""
        return next((path for path, _, value in self._constraints() if value is not None), None)

    def grammar(self) -> Grammar | None:
        """Build the grammar that the request asks for; None for free text.

        Raises:
            InputError: several are given, or one cannot be used; `param` is its path.
        """
        given = [one for one in self._constraints() if one[2] is not None]
        if len(given) > 1:
            first, second = given[0][0], given[1][0]
            raise InputError(
                f"{first} and {second} both constrain the output; give one of them", param=second
            )
        for path, kind, value in given:
            return _build_grammar(path, kind, value)
        return None

    def _constraints(self) -> list[tuple[str, str, Any]]:
        """List (path, kind, value) of all fields; the value is None where none is given."""
        asked = self.structured_outputs or StructuredOutputs()
        path, schema = _schema_of(self.response_format)
        return [
            (path, "json", schema),
            ("structured_outputs.json", "json", asked.json_),
            ("structured_outputs.regex", "regex", asked.regex),
            ("structured_outputs.choice", "choice", asked.choice),
            ("structured_outputs.grammar", "grammar", asked.grammar),
            ("structured_outputs.json_object", "json", ANY_OBJECT if asked.json_object else None),
            ("guided_json", "json", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
        ]


def _schema_of(given: Any) -> tuple[str, dict[str, Any] | None]:
    if isinstance(given, JsonSchemaResponseFormat):
        return "response_format.json_schema.schema", given.json_schema.schema_
    return "response_format", ANY_OBJECT if isinstance(given, JsonObjectFormat) else None


def _build_grammar(path: str, kind: str, value: Any) -> Grammar:
    builders = {
        "json": Grammar.json_schema,
        "regex": Grammar.regex,
        "choice": Grammar.choice,
        "grammar": Grammar.lark,
    }
    if kind == "json" and not isinstance(value, dict | str):
        raise InputError(
            f"{path}: got {abbreviate(value)}, must be an object or JSON text", param=path
        )
    try:
        return builders[kind](value)
    except InputError as error:
        error.param = path
        raise
