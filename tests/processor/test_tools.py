"""Tools: announcing, joining calls and results into one turn, reading calls back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.errors import InputError
from qwen2vl.processor.messages import Call, MediaPart, Part, TextPart, normalize
from qwen2vl.processor.tools import Reply, Turn, announce, join_turns, parse_calls

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


def asks(*calls: tuple[str, str], content: Any = None) -> dict[str, Any]:
    """An assistant's message in OpenAI's form, its calls numbered c0, c1, ..."""
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


def joined(*messages: dict[str, Any]) -> Turn:
    """Join messages that make up one turn."""
    (turn,) = join_turns(normalize(messages))
    return turn


def shown(parts: tuple[Part, ...]) -> str:
    """Write a turn's text with what was given in braces."""
    text = ""
    for part in parts:
        if isinstance(part, MediaPart):
            text += "{PICTURE}"
        else:
            assert isinstance(part, TextPart)
            text += f"{{{part.text}}}" if part.given else part.text
    return text.replace("}{", "")


# Announcing -----------------------------------------------------------------------------------


def test_the_announcement() -> None:
    assert announce([TAP, {"name": "Home", "description": "Go home.", "parameters": None}]) == (
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
def test_a_tool_without_a_name_is_refused(tool: Any) -> None:
    with pytest.raises(InputError, match=r"^tools\[1\] must be .*\"name\""):
        announce([TAP, tool])


# Joining --------------------------------------------------------------------------------------


def test_messages_without_tools_stay_as_they_are() -> None:
    turns = join_turns(
        normalize(
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


def test_the_whole_loop_is_one_turn() -> None:
    turn = joined(
        asks(("Home", "{}"), content="First home."),
        result([{"image": "1.png"}], "c0"),
        asks(("Tap", '{"point": [3, 4]}')),
        result("done", "c0"),
        {"role": "assistant", "content": "It is open."},
    )
    assert shown(turn.parts) == (
        f"First home.\n{FUNCTION}: Home\n{ARGS}: {{}}\n{RESULT}{{: PICTURE\n{RETURN}}}: "
        f'\n{FUNCTION}: Tap\n{ARGS}: {{"point": [3, 4]}}\n{RESULT}{{: done\n{RETURN}}}: '
        "It is open."
    )
    assert not turn.pending


def test_a_turn_that_waits_for_a_reply_ends_before_the_colon() -> None:
    turn = joined(asks(("Home", "{}")), result("ok"))
    assert shown(turn.parts) == f"{FUNCTION}: Home\n{ARGS}: {{}}\n{RESULT}{{: ok\n{RETURN}}}"
    assert turn.pending


def test_parallel_calls_and_their_results_in_the_order_of_the_calls() -> None:
    turn = joined(asks(("f", "1"), ("g", "2")), result("of g", "c1"), result("of f", "c0"))
    assert shown(turn.parts) == (
        f"{FUNCTION}: f\n{ARGS}: 1\n{FUNCTION}: g\n{ARGS}: 2"
        f"\n{RESULT}{{: of f\n{RESULT}: of g\n{RETURN}}}"
    )


def test_an_empty_result_still_answers() -> None:
    turn = joined(asks(("f", "{}")), result(""))
    assert shown(turn.parts).endswith(f"{RESULT}{{: \n{RETURN}}}")


def test_places_inside_a_result_are_given() -> None:
    turn = joined(asks(("f", "{}")), result([{"image": "1.png"}, {"point": [1, 2]}]))
    assert [getattr(part, "given", None) for part in turn.parts[-4:]] == [True, None, True, True]


def test_a_result_needs_a_call() -> None:
    with pytest.raises(InputError, match=r"messages\[1\]: a tool's result must follow"):
        join_turns(normalize([{"role": "user", "content": "a"}, result("b")]))
    with pytest.raises(InputError, match=r"messages\[0\]: a tool's result must follow"):
        join_turns(normalize([result("b")]))


def test_a_result_of_an_unknown_call_is_refused() -> None:
    with pytest.raises(InputError, match=r"messages\[1\]\.tool_call_id is 'c7'; .* ids 'c0', 'c1'"):
        joined(asks(("f", "1"), ("g", "2")), result("x", "c7"), result("y", "c0"))
    with pytest.raises(InputError, match=r"messages\[1\]\.tool_call_id is 'c0'; .* have ids none"):
        joined({"role": "assistant", "content": "words alone"}, result("x", "c0"))


def test_a_loop_written_out_as_text_is_split_at_its_keywords() -> None:
    content = [
        {"text": f"I look.\n{FUNCTION}: Home\n{ARGS}: {{}}\n{RESULT}: "},
        {"image": "1.png"},
        {"text": f"\n{RETURN}: I see a {STAR}. Done.\n{RESULT}: r\n{RESULT}: s\n{RETURN}: End"},
    ]
    turn = joined({"role": "assistant", "content": content})
    assert shown(turn.parts) == (
        f"I look.\n{FUNCTION}: Home\n{ARGS}: {{}}\n{RESULT}{{: PICTURE\n{RETURN}}}"
        f": I see a {STAR}. Done.\n{RESULT}{{: r\n{RESULT}: s\n{RETURN}}}: End"
    )


def test_keywords_of_other_roles_mean_nothing() -> None:
    turn = joined({"role": "user", "content": f"{RESULT} a {RETURN}"})
    assert turn.parts == (TextPart(f"{RESULT} a {RETURN}"),)


# Reading back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Just words.", Reply("Just words.")),
        (": Going on.", Reply("Going on.")),  # after RETURN, the model begins with the colon
        (
            f"I tap.\n{FUNCTION}: Tap\n{ARGS}: {{\"point\": (348,291)}}\n",
            Reply("I tap.", (Call("Tap", '{"point": (348,291)}'),)),
        ),
        (f": \n{FUNCTION}: Home\n{ARGS}: {{}}", Reply("", (Call("Home", "{}"),))),
        (
            f"{FUNCTION}: f\n{ARGS}: {{\"a\": 1}}\n{FUNCTION}: g\n{ARGS}: {{}}\n{RESULT}",
            Reply("", (Call("f", '{"a": 1}'), Call("g", "{}"))),
        ),
        (f"{FUNCTION}: f\n{ARGS}: {{}} }} <!-- so -->", Reply("", (Call("f", "{} }"),))),
        (f"{FUNCTION}: f\n{ARGS}: {{}}\n{RESULT}: lie\n{RETURN}: x", Reply("", (Call("f", "{}"),))),
        (f"{FUNCTION}: f", Reply("", (Call("f", ""),))),
        (f"{FUNCTION}: f\n{ARGS}: not json", Reply("", (Call("f", "not json"),))),
        (f"Words\n{STAR}FUNC", Reply("Words")),
        (f"Words\n{STAR}", Reply("Words")),
        (f"A flower {STAR} here", Reply(f"A flower {STAR} here")),
        ("", Reply("")),
    ],
)  # fmt: skip
def test_calls_are_read_back(text: str, want: Reply) -> None:
    assert parse_calls(text) == want


names = st.text("abcXYZ_0189", min_size=1, max_size=9)
arguments = st.dictionaries(st.text('ab{}"\\ ', max_size=4), st.integers(), max_size=3)


@given(st.lists(st.tuples(names, arguments), max_size=3), st.text("abc .,:", max_size=12))
def test_what_is_rendered_is_read_back(calls: list[tuple[str, dict[str, int]]], said: str) -> None:
    said = said.strip().lstrip(":")
    message = {
        "role": "assistant",
        "content": said.strip(),
        "tool_calls": [{"name": n, "arguments": a} for n, a in calls],
    }
    (read,) = normalize([message])
    text = "".join(part.text for part in joined(message).parts if isinstance(part, TextPart))
    reply = parse_calls(text)
    assert reply.calls == read.calls
    assert reply.text == said.strip()


@given(st.text(f"ab:\n {STAR}", max_size=30) | st.text(max_size=30))
def test_nothing_makes_the_reader_fail(text: str) -> None:
    reply = parse_calls(text)
    assert len(reply.text) <= len(text)
