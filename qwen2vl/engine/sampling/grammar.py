"""Structured output: grammars from a JSON schema, regex, choice, Lark grammar, boxes, or tools.

A `Grammar` is plain data. Its size and its schema keywords (json_schema.py) are checked on
construction; other errors are found when grammar_matcher.py compiles it for a tokenizer. Schemas
are enforced completely or rejected: an unsupported keyword is an error, unless it is an annotation.
JSON output is one line with ", " and ": ", as Python writes it, so that most punctuation is forced
(jump-forward).
(Lark: the syntax of llguidance, in which <|box_start|> is a special token.)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qwen2vl.engine.sampling.json_schema import SchemaSource, parse_schema
from qwen2vl.engine.sampling.schema_rewrites import normalize_schema
from qwen2vl.engine.sampling.tool_grammar import tool_calls_lark
from qwen2vl.errors import InputError, abbreviate
from qwen2vl.grounding import BOX_END, BOX_START, REF_END, REF_START

__all__ = ["Grammar"]

MAX_REGEX_CHARS = 8_192
MAX_LARK_CHARS = 32_768
MAX_CHOICES = 1_000
MAX_CHOICE_CHARS = 1_000

# One or more boxes, each with an optional phrase, optionally separated by line breaks.
_BOXES_GRAMMAR = rf"""
start: item ("\n"? item)*
item: ({REF_START} /[^\n]{{1,200}}/ {REF_END})? {BOX_START} POINT "," POINT {BOX_END}
POINT: /\((0|[1-9][0-9]{{0,2}}),(0|[1-9][0-9]{{0,2}})\)/
"""


_Kind = Literal["json_schema", "regex", "lark", "tools"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar of the whole output text; create it with one of the class methods."""

    kind: _Kind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(_Kind) or not isinstance(self.text, str):
            raise InputError(
                f"Grammar: got {abbreviate(self.kind)} and {abbreviate(self.text)}; create one "
                "with Grammar.json_schema, regex, choice, lark, boxes or tool_calls"
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str | SchemaSource) -> Grammar:
        """Allow the JSON values of a schema (JSON Schema, draft 2020-12).

        Objects may have only the properties listed, unless the schema says otherwise
        (`additionalProperties`, `patternProperties`) or lists the properties of one object in
        several places (`allOf`, or `$ref` with `properties` beside it): if further properties are
        always allowed, a model may never end the object. `oneOf` is accepted if no value can fit
        two branches, as in a discriminated union. Integers without a bound of their own are at
        least -(2^53 - 1) and at most 2^53 - 1, unless they have `multipleOf`.

        Args:
            schema: a mapping, JSON text, a pydantic model class or a pydantic TypeAdapter.

        Raises:
            InputError: not a schema, too large or too deeply nested, or a keyword or value that
                cannot be obeyed; names it and its place.
        """
        return cls("json_schema", json.dumps(normalize_schema(parse_schema(schema))))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Allow full matches of a regular expression without look-around and back-references.

        Raises:
            InputError: not a string, empty, or too long.
        """
        text = _check_length("regex", pattern, MAX_REGEX_CHARS)
        if (len(text) - len(text.rstrip("\\"))) % 2:  # llguidance would escape what it appends
            raise InputError(
                f"regex: ends in a single backslash at character {len(text)}; write two to match "
                "one"
            )
        return cls("regex", text)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """Allow exactly one of several texts.

        Raises:
            InputError: no or too many texts, or one that is empty or too long.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise InputError(f"choice: got {abbreviate(texts)}, must be a list of texts")
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

    @classmethod
    def tool_calls(
        cls,
        tools: Sequence[Mapping[str, Any]],
        *,
        names: Collection[str] | None = None,
        parallel: bool = True,
        after_result: bool = False,
        allow_text: bool = False,
        answer: Grammar | None = None,
    ) -> Grammar:
        """Allow tool calls in the model's format, whose arguments follow their JSON schemas.

        (OpenAI: tool_choice "required" or a name, function.strict.)

        Args:
            tools: function definitions, in OpenAI's format or flat, with valid names.
            names: tools that may be called; None: all.
            parallel: several calls are allowed, at most 16.
            after_result: the output follows a tool's result, so it begins with a colon.
            allow_text: text may come before the calls, or in place of them; then only the
                arguments of tools with `strict` follow their schema.
            answer: from `json_schema`: an answer that may come in place of the calls.

        Raises:
            InputError: no tool of such a name, an answer that is no JSON schema, or a schema that
                cannot be obeyed; names the tool, the keyword and its place.
        """
        if answer is not None and answer.kind != "json_schema":
            raise InputError(
                f"answer: got a grammar of kind {answer.kind!r}, must be one of a JSON schema; "
                "only that can be combined with tool calls"
            )
        return cls(
            "tools",
            tool_calls_lark(
                tools,
                names=names,
                parallel=parallel,
                after_result=after_result,
                allow_text=allow_text,
                answer=None if answer is None else answer.text,
            ),
        )


def _check_length(name: str, text: str, limit: int) -> str:
    if not isinstance(text, str) or not text:
        raise InputError(f"{name}: got {abbreviate(text)}, must be a text that is not empty")
    if len(text) > limit:
        raise InputError(f"{name}: {len(text):,} characters, at most {limit:,} are allowed")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise InputError(
            f"{name}: the text holds half of a surrogate pair (U+D800 to U+DFFF), which is not a "
            "character; decode it properly first"
        )
    return text
