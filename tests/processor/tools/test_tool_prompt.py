"""Tool calling: system prompt, merging of calls and results into one turn."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.errors import InputError
from qwen2vl.processor.content import MediaPart, Part, TextPart
from qwen2vl.processor.messages import parse_messages
from qwen2vl.processor.tools import Turn, check_tools, describe_tools, merge_turns

STAR = "\u273f"
FUNCTION, ARGS, RESULT, RETURN = (
    f"{STAR}{w}{STAR}" for w in ("FUNCTION", "ARGS", "RESULT", "RETURN")
)

TAP = {
    "type": "function",
    "function": {
        "name": "Tap",
        "description": "Touch the screen.",
        "parameters": {"type": "object", "properties": {"point": {"type": "array"}}},
    },
}


def tool_call_message(*calls: tuple[str, str], content: Any = None) -> dict[str, Any]:
    """Build an assistant message in OpenAI's format, with call ids c0, c1, ..."""
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"id": f"c{i}", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ],
    }


def result(content: Any, call_id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def merged(*messages: dict[str, Any]) -> Turn:
    """Merge messages that form one turn."""
    (turn,) = merge_turns(parse_messages(messages))
    return turn


def text_of(parts: tuple[Part, ...]) -> str:
    """Return the text of a turn, with tool output in braces."""
    text = ""
    for part in parts:
        if isinstance(part, MediaPart):
            text += "{IMAGE}"
        else:
            assert isinstance(part, TextPart)
            text += f"{{{part.text}}}" if part.is_context else part.text
    return text.replace("}{", "")


# Tool definitions in the system prompt --------------------------------------------------------


def test_description_of_tools() -> None:
    assert describe_tools(
        [TAP, {"name": "Home", "description": "Go home.", "parameters": None}]
    ) == (
        "# Tools\n\n"
        "## You have access to the following tools:\n\n"
        '### Tap\n\nTap: Touch the screen. Parameters: {"type": "object", "properties": '
        '{"point": {"type": "array"}}} Format the arguments as a JSON object.\n\n'
        "### Home\n\nHome: Go home. Parameters: {} Format the arguments as a JSON object.\n\n"
        "## When you need to call a tool, please insert the following command in your reply, "
        "which can be called zero or multiple times according to your needs:\n\n"
        f"{FUNCTION}: The tool to use, should be one of [Tap,Home]\n"
        f"{ARGS}: The input of the tool\n"
        f"{RESULT}: Tool results\n"
        f"{RETURN}: Reply based on tool results. Images need to be rendered as ![](url)"
    )


@pytest.mark.parametrize("tool", ["Tap", {}, {"function": "Tap"}, {"name": ""}, {"name": 3}])
def test_tool_without_a_name_is_rejected(tool: Any) -> None:
    with pytest.raises(InputError, match=r"^tools\[1\] must be .*\"name\""):
        describe_tools([TAP, tool])


@pytest.mark.parametrize("tools", [True, "", "tap", TAP, 0, 10**30])
def test_tools_are_a_list(tools: Any) -> None:
    with pytest.raises(InputError, match=r"^tools: got .*must be a list of function definitions"):
        check_tools(tools)


# Merging messages into turns ------------------------------------------------------------------


def test_messages_without_tools_are_not_merged() -> None:
    turns = merge_turns(
        parse_messages(
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "assistant", "content": "c"},
                {"role": "user", "content": "d"},
            ]
        )
    )
    assert [turn.role for turn in turns] == ["user", "assistant", "assistant", "user"]
    assert not any(turn.pending for turn in turns)


def test_whole_tool_loop_is_one_turn() -> None:
    turn = merged(
        tool_call_message(("Home", "{}"), content="First home."),
        result([{"image": "1.png"}], "c0"),
        tool_call_message(("Tap", '{"point": [3, 4]}')),
        result("done", "c0"),
        {"role": "assistant", "content": "It is open."},
    )
    assert text_of(turn.parts) == (
        f"First home.\n{FUNCTION}: Home\n{ARGS}: {{}}\n{RESULT}{{: IMAGE\n{RETURN}}}: "
        f'\n{FUNCTION}: Tap\n{ARGS}: {{"point": [3, 4]}}\n{RESULT}{{: done\n{RETURN}}}: '
        "It is open."
    )
    assert not turn.pending


def test_pending_turn_ends_before_the_colon() -> None:
    turn = merged(tool_call_message(("Home", "{}")), result("ok"))
    assert text_of(turn.parts) == f"{FUNCTION}: Home\n{ARGS}: {{}}\n{RESULT}{{: ok\n{RETURN}}}"
    assert turn.pending


def test_results_of_parallel_calls_are_in_the_order_of_the_calls() -> None:
    turn = merged(
        tool_call_message(("f", "1"), ("g", "2")), result("of g", "c1"), result("of f", "c0")
    )
    assert text_of(turn.parts) == (
        f"{FUNCTION}: f\n{ARGS}: 1\n{FUNCTION}: g\n{ARGS}: 2"
        f"\n{RESULT}{{: of f\n{RESULT}: of g\n{RETURN}}}"
    )


def test_empty_result() -> None:
    turn = merged(tool_call_message(("f", "{}")), result(""))
    assert text_of(turn.parts).endswith(f"{RESULT}{{: \n{RETURN}}}")


def test_grounding_inside_a_result_is_tool_output() -> None:
    turn = merged(tool_call_message(("f", "{}")), result([{"image": "1.png"}, {"point": [1, 2]}]))
    assert [getattr(part, "is_context", None) for part in turn.parts[-4:]] == [
        True,
        None,
        True,
        True,
    ]


def test_result_without_a_call_is_rejected() -> None:
    with pytest.raises(InputError, match=r"messages\[1\]: a tool's result must follow"):
        merge_turns(parse_messages([{"role": "user", "content": "a"}, result("b")]))
    with pytest.raises(InputError, match=r"messages\[0\]: a tool's result must follow"):
        merge_turns(parse_messages([result("b")]))


def test_result_of_an_unknown_call_is_rejected() -> None:
    with pytest.raises(InputError, match=r"messages\[1\]\.tool_call_id is 'c7'; .* ids 'c0', 'c1'"):
        merged(tool_call_message(("f", "1"), ("g", "2")), result("x", "c7"), result("y", "c0"))
    with pytest.raises(InputError, match=r"messages\[1\]\.tool_call_id is 'c0'; .* have ids none"):
        merged({"role": "assistant", "content": "words alone"}, result("x", "c0"))


def test_tool_loop_written_as_text_is_split_at_its_keywords() -> None:
    content = [
        {"text": f"I look.\n{FUNCTION}: Home\n{ARGS}: {{}}\n{RESULT}: "},
        {"image": "1.png"},
        {"text": f"\n{RETURN}: I see a {STAR}. Done.\n{RESULT}: r\n{RESULT}: s\n{RETURN}: End"},
    ]
    turn = merged({"role": "assistant", "content": content})
    assert text_of(turn.parts) == (
        f"I look.\n{FUNCTION}: Home\n{ARGS}: {{}}\n{RESULT}{{: IMAGE\n{RETURN}}}"
        f": I see a {STAR}. Done.\n{RESULT}{{: r\n{RESULT}: s\n{RETURN}}}: End"
    )


def test_keywords_in_other_roles_are_plain_text() -> None:
    turn = merged({"role": "user", "content": f"{RESULT} a {RETURN}"})
    assert turn.parts == (TextPart(f"{RESULT} a {RETURN}"),)
