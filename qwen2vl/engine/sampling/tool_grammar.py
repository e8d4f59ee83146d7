"""Grammar of tool calls in Qwen2-VL's format, with the JSON schema of each tool's arguments.

    FUNCTION: name \\n ARGS: {"a": 1} \\n FUNCTION: ... \\n RESULT

Each call is followed by another one, by RESULT, which is a stop string, or by the end. The model
was trained to write RESULT there: if only calls could follow a line break, it would write them.
(OpenAI: tool_choice "required" or a name, function.strict; vLLM: structural tags.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from qwen2vl.engine.sampling.json_schema import MAX_SCHEMA_DEPTH, Schema, parse_schema
from qwen2vl.engine.sampling.schema_rewrites import normalize_schema
from qwen2vl.errors import InputError, abbreviate
from qwen2vl.grounding import GROUNDING_TOKENS
from qwen2vl.processor.tools.tool_prompt import ARGS, FUNCTION, RESULT, STAR

__all__ = ["JSON_OPTIONS", "arguments_schema", "check_parameters", "tool_calls_lark"]

MAX_PARALLEL_CALLS = 16
MAX_TOOL_GRAMMAR_CHARS = 131_072

# One line, as Python writes it, so that most punctuation is forced (jump-forward).
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

MAX_PATTERN_CHARS = 8_192
MAX_ENUM_VALUES = 1_000  # of a schema that only describes a tool (OpenAI's limit)
_TYPES = frozenset("null boolean integer number string array object".split())
_NAMED_SUBSCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SUBSCHEMAS = (
    "items prefixItems additionalItems contains additionalProperties propertyNames "
    "unevaluatedItems unevaluatedProperties anyOf oneOf allOf not if then else"
).split()

_FIRST_CALL = f"{FUNCTION}: "
_NEXT_CALL = f"\n{FUNCTION}: "
_END = f"\n{RESULT}"
_NO_PARAMETERS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}


# Schemas that describe tools -------------------------------------------------------------------


def check_parameters(parameters: object, path: str) -> None:
    """Check the schema of a tool that is described to the model, whether or not it is enforced.

    Keywords that cannot be enforced are accepted, because a description may have them; values that
    no JSON schema has are refused.

    Args:
        parameters: JSON schema of the arguments, or None.
        path: where it is in the request, for errors.

    Raises:
        InputError: a type, pattern or list that is not one, or nesting that is too deep; its
            `param` is the path.
    """
    pending: list[tuple[str, Any, int]] = [("#", {} if parameters is None else parameters, 0)]
    while pending:
        pointer, node, depth = pending.pop()
        if isinstance(node, bool):
            continue
        if not isinstance(node, Mapping):
            problem = f"is {abbreviate(node)}, must be a schema (an object or a boolean)"
        elif depth > MAX_SCHEMA_DEPTH:
            problem = f"is nested deeper than {MAX_SCHEMA_DEPTH}; use $ref for recursive values"
        else:
            problem = _problem_of(node)
        if problem is not None:
            raise _error_at(path, f"{path}: JSON schema: {pointer[:60]} {problem}")
        pending += [(f"{pointer}/{name}", sub, depth + 1) for name, sub in _subschemas(node)]


def _problem_of(node: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the keywords of a schema."""
    types = node.get("type", [])
    for name in types if isinstance(types, list) else [types]:
        if not isinstance(name, str) or name not in _TYPES:
            known = ", ".join(sorted(_TYPES))
            return f"has type {abbreviate(name)}, must be one or several of {known}"
    enum = node.get("enum", [])
    if not isinstance(enum, list) or len(enum) > MAX_ENUM_VALUES:
        return f"has enum {abbreviate(enum)}, must be a list of at most {MAX_ENUM_VALUES:,} values"
    if not isinstance(node.get("required", []), list):
        return f"has required {abbreviate(node['required'])}, must be a list of names"
    for keyword in _NAMED_SUBSCHEMAS:
        if not isinstance(node.get(keyword, {}), Mapping):
            return f"has {keyword} {abbreviate(node[keyword])}, must be an object of schemas"
    pattern = node.get("pattern", "")
    if not isinstance(pattern, str) or not _is_regex(pattern):
        return f"has pattern {abbreviate(pattern)}, must be a regular expression"
    return None


def _is_regex(pattern: str) -> bool:
    """Return whether Python or llguidance can read a pattern; ECMAScript's syntax is between."""
    if len(pattern) > MAX_PATTERN_CHARS:
        return False
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        pass
    else:
        return True
    try:
        from llguidance import LLMatcher
    except ImportError:  # an optional dependency
        return True
    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(pattern), None)


def _subschemas(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword in _NAMED_SUBSCHEMAS:
        yield from ((f"{keyword}/{name}", sub) for name, sub in node.get(keyword, {}).items())
    for keyword in _SUBSCHEMAS:
        value = node.get(keyword, [])
        if isinstance(value, list):
            yield from ((f"{keyword}/{i}", sub) for i, sub in enumerate(value))
        else:
            yield keyword, value


def _error_at(path: str, text: str) -> InputError:
    return InputError(text, param=path)


# Grammar --------------------------------------------------------------------------------------


def arguments_schema(parameters: object, path: str) -> Schema:
    """Return the schema of a tool's arguments, rewritten for llguidance.

    Args:
        parameters: JSON schema of an object; None: the tool has no parameters.
        path: where it is in the request, for errors: "tools[0].function.parameters".

    Raises:
        InputError: a keyword or its value cannot be obeyed; its `param` is the path.
    """
    if parameters is None:
        return deepcopy(_NO_PARAMETERS)
    try:
        schema = parse_schema(parameters)
        if "$ref" not in schema and schema.setdefault("type", "object") != "object":
            got = abbreviate(schema["type"])
            raise InputError(f'JSON schema: # has type {got}, must be "object": arguments are one')
        return normalize_schema(schema)
    except InputError as error:
        raise _error_at(path, f"{path}: {error}") from error


def tool_calls_lark(
    tools: Sequence[Mapping[str, Any]],
    *,
    names: Collection[str] | None = None,
    parallel: bool = True,
    after_result: bool = False,
    allow_text: bool = False,
    answer: str | None = None,
) -> str:
    """Write the Lark grammar of tool calls, for `Grammar.tool_calls`.

    Args:
        tools: function definitions, in OpenAI's format or flat.
        names: tools that may be called; None: all.
        parallel: several calls are allowed.
        after_result: the output follows a tool's result, so it begins with a colon.
        allow_text: text may come before the calls, or in place of them; then only the arguments of
            tools with `strict` follow their schema.
        answer: normalized JSON schema of an answer in place of the calls.

    Raises:
        InputError: no tool of such a name, or a schema that cannot be obeyed.
    """
    call_rules: list[str] = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool)
        where = f"tools[{i}].function" if "function" in tool else f"tools[{i}]"
        if names is not None and function["name"] not in names:
            continue
        schema = {"type": "object"}
        if not allow_text or function.get("strict"):
            schema = arguments_schema(function.get("parameters"), f"{where}.parameters")
        head = f"{function['name']}\n{ARGS}: "
        call_rules += [f"call_{i}: {_quote(head)} arguments_{i}", f"arguments_{i}: {_json(schema)}"]
    if not call_rules:
        raise InputError(f"tools: none is named {abbreviate(names)}; give its definition")
    more = f" ({_quote(_NEXT_CALL)} call){{0,{MAX_PARALLEL_CALLS - 1}}}" if parallel else ""
    lark = "\n".join(
        (
            *_start_rules(after_result, allow_text, answer),
            f"calls: call{more} ({_quote(_END)})?",
            f"call: {' | '.join(rule.partition(':')[0] for rule in call_rules[::2])}",
            *call_rules,
        )
    )
    if len(lark) > MAX_TOOL_GRAMMAR_CHARS:
        raise InputError(
            f"tools: their schemas have {len(lark):,} characters, at most "
            f"{MAX_TOOL_GRAMMAR_CHARS:,} are allowed; offer fewer tools"
        )
    return lark


def _start_rules(after_result: bool, allow_text: bool, answer: str | None) -> list[str]:
    """Return the rules of what is before `calls`."""
    first_call = _quote(f": {_NEXT_CALL}" if after_result else _FIRST_CALL)
    if answer is not None:
        colon = '": " ' if after_result else ""
        return [
            f"start: {colon}answer | {first_call} calls",
            f"answer: {_json(json.loads(answer))}",
        ]
    if not allow_text:
        return [f"start: {first_call} calls"]
    # The keyword ends a lazy token of its own: a greedy one would read its first byte, with which
    # dashes and quotes begin too, and could not go back.
    return [
        "start: piece* last?",
        f"piece: TEXT? ({' | '.join(GROUNDING_TOKENS)})",
        "last: TEXT | head calls",
        f"TEXT: /[^{STAR}]+/",
        f"head[lazy]: /[^{STAR}]*{_FIRST_CALL}/",
    ]


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({'x-guidance': JSON_OPTIONS, **schema})}"
