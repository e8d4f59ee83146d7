"""Grammar of tool calls: what random outputs are, what is refused, and nano's calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen2vl.engine import LLM
from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.engine.sampling.tool_grammar import arguments_schema, check_parameters
from qwen2vl.errors import InputError
from qwen2vl.processor.tools import STOP_WORDS, parse_tool_calls
from tests.engine.sampling.test_grammar_matcher import PERSON, compiler_of, nano, random_output

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 5}},
            "required": ["place"],
        },
    },
}
PERSON_TOOL = {"name": "add-person", "parameters": PERSON, "strict": True}  # flat, as in Responses
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, PERSON_TOOL, CLOCK]
KEYS = {"weather": ({"place"}, set()), "add-person": ({"name", "age"}, {"tags"}), "clock": ((), ())}
NUM_SAMPLES = 24


def outputs(grammar: Grammar) -> list[str]:
    """Return complete random outputs of a grammar, with the stop strings that end them."""
    found = []
    for seed in range(NUM_SAMPLES):
        text = random_output(
            nano(), compiler_of(None).create_matcher(grammar), seed, max_tokens=800
        )
        if text is not None:
            found.append(text)
    assert len(found) > NUM_SAMPLES // 2
    return found


def check_calls(text: str, *, after_result: bool = False) -> list[str]:
    """Check the calls of an output against the schemas; return the names."""
    calls = parse_tool_calls(text, after_result=after_result).tool_calls
    for call in calls:
        required, optional = KEYS[call.name]
        keys = set(json.loads(call.arguments))
        assert set(required) <= keys <= {*required, *optional}
    return [call.name for call in calls]


def test_random_outputs_are_calls_of_the_tools() -> None:
    texts = outputs(Grammar.tool_calls(TOOLS))
    names = [check_calls(text) for text in texts]
    assert all(names)
    assert {name for called in names for name in called} == set(KEYS)
    assert max(map(len, names)) > 1
    assert all(parse_tool_calls(text).text == "" for text in texts)
    assert any(text.endswith(f"\n{STOP_WORDS[0]}") for text in texts)
    assert any(text.endswith("}") for text in texts)


def test_one_call_of_one_tool() -> None:
    for text in outputs(Grammar.tool_calls(TOOLS, names=["clock"], parallel=False)):
        assert check_calls(text) == ["clock"]


def test_after_a_result_the_output_begins_with_a_colon() -> None:
    for text in outputs(Grammar.tool_calls(TOOLS, after_result=True)):
        assert text.startswith(": \n")
        assert check_calls(text, after_result=True)


def test_text_may_come_before_calls_or_in_place_of_them() -> None:
    grammar = Grammar.tool_calls([PERSON_TOOL, CLOCK], allow_text=True)
    matcher = compiler_of(None).create_matcher(grammar)
    for token in nano().encode_text(
        'Well, {"a": 1}.\n\u273fFUNCTION\u273f: add-person\n\u273fARGS\u273f: {"name": "'
    ):
        assert matcher.token_mask()[token]
        matcher.accept_token(token)
    matcher = compiler_of(None).create_matcher(grammar)
    box = '<|box_start|>(1,2),(3,4)<|box_end|>\n\u273fFUNCTION\u273f: clock\n\u273fARGS\u273f: {"x'
    for token in nano().encode_text(box, allowed_special="markup"):
        assert matcher.token_mask()[token]  # without strict, any object
        matcher.accept_token(token)


def test_answer_of_a_schema_in_place_of_calls() -> None:
    answer = Grammar.json_schema(PERSON)
    texts = outputs(Grammar.tool_calls([WEATHER, CLOCK], answer=answer))
    answers = [text for text in texts if not check_calls(text)]
    assert 0 < len(answers) < len(texts)
    assert all({"name", "age"} <= set(json.loads(text)) for text in answers)
    for text in outputs(Grammar.tool_calls([CLOCK], answer=answer, after_result=True)):
        assert text.startswith((": \n", ": {"))


def test_nano_calls_tools_that_it_was_not_trained_to_call() -> None:
    with LLM("nano", dtype="float32", device="cpu") as llm:
        (completion,) = llm.chat(
            [{"role": "user", "content": "Add Ann, who is 30."}],
            grammar=Grammar.tool_calls(TOOLS, names=["add-person"], parallel=False),
            max_tokens=150,
            temperature=0,
        )
    assert completion.finish_reason == "stop"
    assert check_calls(completion.text) == ["add-person"]


def test_many_tools_are_compiled_in_time() -> None:
    tools = [{"name": f"tool_{i}", "parameters": PERSON} for i in range(128)]
    assert compiler_of(None).create_matcher(Grammar.tool_calls(tools)).token_mask().any()


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"type": "array"}, "# has type 'array', must be \"object\""),
        ({"properties": {"x": {"not": {}}}}, "#/properties/x has the keyword 'not'"),
        ({"properties": {"x": {"type": "string", "format": "regex"}}}, "#/properties/x has format"),
        ({"$ref": "#/$defs/none"}, "but there is no schema"),
        ("text", "not valid JSON"),
    ],
)
def test_schemas_that_cannot_be_obeyed_are_refused(parameters: Any, text: str) -> None:
    path = "tools[1].function.parameters"
    with pytest.raises(InputError) as caught:
        arguments_schema(parameters, path)
    assert str(caught.value).startswith(f"{path}: JSON schema: ")
    assert text in str(caught.value)
    assert caught.value.param == path
    with pytest.raises(InputError) as again:
        Grammar.tool_calls(
            [CLOCK, {"type": "function", "function": {"name": "f", "parameters": parameters}}]
        )
    assert str(again.value) == str(caught.value)


def test_tools_without_strict_need_no_schema_if_text_is_allowed() -> None:
    tool = {"name": "f", "parameters": {"properties": {"x": {"not": {}}}}}
    assert "%json" in Grammar.tool_calls([tool], allow_text=True).text
    with pytest.raises(InputError, match=r"^tools\[0\]\.parameters: JSON schema: #/properties/x"):
        Grammar.tool_calls([{**tool, "strict": True}], allow_text=True)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(InputError, match=r"^tools: none is named \['x'\]"):
        Grammar.tool_calls(TOOLS, names=["x"])
    with pytest.raises(InputError, match=r"^answer: got a grammar of kind 'regex'"):
        Grammar.tool_calls(TOOLS, answer=Grammar.regex("a"))
    enum = {"type": "object", "properties": {"x": {"enum": ["y" * 300] * 90}}}
    with pytest.raises(InputError, match=r"^tools: their schemas have .* offer fewer tools"):
        Grammar.tool_calls([{"name": f"f{i}", "parameters": enum} for i in range(8)])
    bad = {"name": "f", "parameters": {"properties": {"x": {"type": "string", "pattern": "(?=a)"}}}}
    with pytest.raises(InputError, match=r"^tools: "):
        compiler_of(None).create_matcher(Grammar.tool_calls([bad]))


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        PERSON,
        {"type": "object", "properties": {"type": {"type": ["string", "null"]}}},
        {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}, "x-vendor": 1},
        {"properties": {"x": {"pattern": r"^\p{L}+$"}, "y": {"pattern": "(?=a)b"}, "z": True}},
        {"$defs": {"node": {"items": {"$ref": "#/$defs/node"}}}, "$ref": "#/$defs/node"},
    ],
)
def test_schemas_that_describe_a_tool_may_have_any_keyword(parameters: Any) -> None:
    check_parameters(parameters, "tools[0].parameters")


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"properties": {"x": schema}}
    return schema


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"type": "struct"}, "# has type 'struct', must be one or several of array, boolean,"),
        ({"type": 3}, "# has type 3"),
        ({"properties": ["x"]}, "# has properties ['x'], must be an object of schemas"),
        ({"properties": {"x": "string"}}, "#/properties/x is 'string', must be a schema"),
        ({"properties": {"x": {"pattern": "("}}}, "#/properties/x has pattern '(', must be a reg"),
        ({"properties": {"x": {"pattern": 1}}}, "#/properties/x has pattern 1"),
        ({"items": {"enum": list(range(1001))}}, "#/items has enum"),
        ({"anyOf": [{"required": "x"}]}, "#/anyOf/0 has required 'x', must be a list of names"),
        (deep(33), "is nested deeper than 32"),
        (deep(5000), "is nested deeper than 32"),
    ],
)
def test_values_that_no_schema_has_are_refused(parameters: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        check_parameters(parameters, "tools[0].parameters")
    assert text in str(caught.value)
    assert str(caught.value).startswith("tools[0].parameters: JSON schema: #")
    assert caught.value.param == "tools[0].parameters"
    assert len(str(caught.value)) < 300
