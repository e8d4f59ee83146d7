"""ToolPlan: what tools and tool_choice mean, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.engine import Grammar
from qwen2vl.errors import InputError
from qwen2vl.processor.tools import STOP_WORDS
from qwen2vl.server.protocol.chat import MAX_TOOLS
from qwen2vl.server.serving.tool_choice import ToolPlan

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
UNSUPPORTED = {"type": "object", "properties": {"x": {"not": {"const": 1}}}}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


TOOLS = [tool("f", description="Does f.", parameters=SCHEMA), tool("g")]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [named(name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_no_tools() -> None:
    for plan in (ToolPlan.from_request(None), ToolPlan.from_request([], "auto", False)):
        assert plan.tools is None
        assert plan.stop == ()
        assert plan.create_parser() is None
        assert plan.grammar() is None
        answer = Grammar.regex("a")
        assert plan.grammar(answer) is answer


@pytest.mark.parametrize("choice", [None, "auto"])
def test_auto_leaves_the_choice_to_the_model(choice: str | None) -> None:
    plan = ToolPlan.from_request(TOOLS, choice)
    assert plan.tools == tuple(TOOLS)
    assert plan.stop == STOP_WORDS
    assert plan.grammar() is None
    assert plan.create_parser() is not None


def test_none_leaves_the_tools_out() -> None:
    plan = ToolPlan.from_request(TOOLS, "none")
    assert plan.tools is None
    assert plan.stop == ()
    assert plan.create_parser() is None


def test_required_and_names_are_enforced() -> None:
    every = ToolPlan.from_request(TOOLS, "required").grammar()
    assert every == Grammar.tool_calls(TOOLS)
    plan = ToolPlan.from_request(TOOLS, named("g"))
    assert plan.grammar() == Grammar.tool_calls(TOOLS, names=["g"], parallel=False)
    assert plan.tools == tuple(TOOLS)  # the prompt stays the same, and so does its cache
    single = ToolPlan.from_request(TOOLS, "required", False)
    assert single.grammar() == Grammar.tool_calls(TOOLS, parallel=False)
    assert single.max_calls == 1
    answer = Grammar.json_schema(SCHEMA)
    assert ToolPlan.from_request(TOOLS, "required").grammar(answer) == every


def test_allowed_tools() -> None:
    plan = ToolPlan.from_request(TOOLS, allowed("auto", "g"))
    assert plan.tools == (TOOLS[1],)
    assert plan.grammar() is None
    plan = ToolPlan.from_request(TOOLS, allowed("required", "g", "f", "g"))
    assert plan.grammar() == Grammar.tool_calls(TOOLS)
    flat = [{"type": "function", **one["function"]} for one in TOOLS]
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "f"}],
    }
    plan = ToolPlan.from_request(flat, choice, is_flat=True)
    assert plan.tools == (TOOLS[0],)
    assert plan.grammar() == Grammar.tool_calls(TOOLS[:1])


def test_strict_functions_are_enforced_without_being_forced() -> None:
    tools = [tool("f", parameters=SCHEMA, strict=True), tool("g", parameters=UNSUPPORTED)]
    plan = ToolPlan.from_request(tools)
    assert plan.grammar() == Grammar.tool_calls(tools, allow_text=True)


def test_a_schema_of_the_answer_is_an_alternative_to_calls() -> None:
    answer = Grammar.json_schema(SCHEMA)
    plan = ToolPlan.from_request(TOOLS)
    assert plan.grammar(answer) == Grammar.tool_calls(TOOLS, answer=answer)
    with pytest.raises(
        InputError, match='"auto" can be combined with a JSON schema only'
    ) as caught:
        plan.grammar(Grammar.regex("a"))
    assert caught.value.param == "tool_choice"


def test_after_a_result_the_colon_is_dropped() -> None:
    plan = ToolPlan.from_request(None, after_result=True)
    parser = plan.create_parser()
    assert parser is not None
    assert plan.stop == STOP_WORDS
    events = [*parser.feed(": Done. \u273fFUNCTION\u273f: f"), *parser.finish()]
    assert [event.text for event in events] == ["Done."]  # type: ignore[union-attr]
    plan = ToolPlan.from_request(TOOLS, "required", after_result=True)
    assert plan.grammar() == Grammar.tool_calls(TOOLS, after_result=True)
    before = ToolPlan.from_request(TOOLS).create_parser()
    assert before is not None
    assert [event.text for event in before.feed(": a")] == [": a"]  # type: ignore[union-attr]


def test_fields_without_a_meaning_here_are_dropped() -> None:
    given = {"type": "function", "name": "f", "strict": None, "defer_loading": True}
    plan = ToolPlan.from_request([given], is_flat=True)
    assert plan.tools == (tool("f"),)


BIG = tool("big", description="x" * 300_000)


@pytest.mark.parametrize(
    ("tools", "choice", "param", "text"),
    [
        ({"f": 1}, None, "tools", "must be a list of functions"),
        ([tool(f"f{i}") for i in range(MAX_TOOLS + 1)], None, "tools", "got 129, at most 128"),
        ([BIG], None, "tools", "at most 262,144 are allowed"),
        (["f"], None, "tools[0]", "got 'f', must be an object"),
        ([{"type": "web_search"}], None, "tools[0].type", "is 'web_search'; only functions"),
        ([{"type": "function"}], None, "tools[0].function", "is missing"),
        ([tool("a b")], None, "tools[0].function.name", "is 'a b', must be 1 to 64 letters"),
        ([tool("x" * 65)], None, "tools[0].function.name", "must be 1 to 64 letters"),
        ([tool("f\n")], None, "tools[0].function.name", "must be 1 to 64 letters"),
        ([tool("f"), tool("f")], None, "tools[1].function.name", "is 'f', as that of tools[0]"),
        ([tool("f", description=1)], None, "tools[0].function.description", "must be a string"),
        ([tool("f", strict="yes")], None, "tools[0].function.strict", "must be true or false"),
        ([tool("f", parameters=[])], None, "tools[0].function.parameters", "must be a JSON schema"),
        ([tool("f", parameter={})], None, "tools[0].function.parameter", "did you mean parameters"),
        (
            [TOOLS[0], tool("h", parameters={"type": "struct"})],
            None,
            "tools[1].function.parameters",
            "# has type 'struct'",
        ),
        (
            [TOOLS[0], tool("h", parameters=UNSUPPORTED)],
            named("h"),
            "tools[1].function.parameters",
            "#/properties/x has the keyword 'not'",
        ),
        (
            [tool("h", parameters=UNSUPPORTED, strict=True)],
            "auto",
            "tools[0].function.parameters",
            "#/properties/x has the keyword 'not'",
        ),
        (None, "required", "tool_choice", "but there are no tools; give tools"),
        (TOOLS, "always", "tool_choice", "got 'always', must be"),
        (TOOLS, {"type": "custom"}, "tool_choice", "must be"),
        (TOOLS, named("ff"), "tool_choice.function.name", "is 'ff', which no tool"),
        (TOOLS, {"type": "function"}, "tool_choice.function.name", "is None"),
        (TOOLS, allowed("any", "f"), "tool_choice.allowed_tools.mode", "is 'any'"),
        (TOOLS, allowed("auto"), "tool_choice.allowed_tools.tools", "must be a list of 1 to 128"),
        (
            TOOLS,
            allowed("auto", "f", "x"),
            "tool_choice.allowed_tools.tools[1].function.name",
            "is 'x'",
        ),
    ],
)
def test_refusals_name_the_place(tools: Any, choice: Any, param: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        ToolPlan.from_request(tools, choice)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([TOOLS[0]], None, "tools[0].function"),
        ([{"name": "f"}], None, "tools[0].type"),
        (
            [{"type": "function", "name": "f", "parameters": {"type": 1}}],
            None,
            "tools[0].parameters",
        ),
        (
            [{"type": "function", "name": "f"}],
            {"type": "function", "name": "g"},
            "tool_choice.name",
        ),
        (
            [{"type": "function", "name": "f", "parameters": UNSUPPORTED}],
            "required",
            "tools[0].parameters",
        ),
    ],
)
def test_refusals_of_the_flat_form(tools: Any, choice: Any, param: str) -> None:
    with pytest.raises(InputError) as caught:
        ToolPlan.from_request(tools, choice, is_flat=True)
    assert caught.value.param == param
