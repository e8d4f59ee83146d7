"""Tools: how they are announced to the model, how calls and results join its turn, and back.

Qwen2-VL was trained on one assistant turn that holds the whole loop, pictures included:

    ...thought...
    *FUNCTION*: Tap                 written by the model
    *ARGS*: {"point": (348,291)}    written by the model
    *RESULT*: a screenshot          given by the world
    *RETURN*: ...thought...         the model goes on

(each star is U+273F). The chat template itself knows no tools. The announcement's wording is a
wire format: it is Qwen-Agent's (Apache-2.0). (Qwen2-VL sec. 2.2.1.) Next: chat.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from qwen2vl.errors import InputError
from qwen2vl.processor.messages import Call, MediaPart, Message, Part, TextPart

__all__ = ["STOP_WORDS", "Reply", "Turn", "announce", "join_turns", "parse_calls"]

STAR = "\u273f"
FUNCTION, ARGS, RESULT, RETURN = (
    f"{STAR}{word}{STAR}" for word in ("FUNCTION", "ARGS", "RESULT", "RETURN")
)
STOP_WORDS = (RESULT, RETURN)  # where generation hands over to the world
_STOPS = re.compile(f"({RESULT}|{RETURN})")


@dataclass(frozen=True, slots=True)
class Turn:
    """What stands between two <|im_start|>; several messages, when tools were called."""

    role: str
    parts: tuple[Part, ...]
    pending: bool = False  # ends with a result, and the assistant has not gone on


@dataclass(frozen=True, slots=True)
class Reply:
    """What an assistant's text says, and the tools it calls."""

    text: str
    calls: tuple[Call, ...] = ()


# Announcing -----------------------------------------------------------------------------------


def announce(tools: Sequence[Mapping[str, Any]]) -> str:
    """Describe tools for the system turn.

    Raises:
        InputError: a tool has no name, or is not OpenAI's or Qwen's form.
    """
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names = ",".join(function["name"] for function in functions)
    return "\n\n".join(
        [
            "# Tools",
            "## You have access to the following tools:",
            *(_description(function) for function in functions),
            "## When you need to call a tool, please insert the following command in your reply, "
            "which can be called zero or multiple times according to your needs:",
            f"{FUNCTION}: The tool to use, should be one of [{names}]\n"
            f"{ARGS}: The input of the tool\n"
            f"{RESULT}: Tool results\n"
            f"{RETURN}: Reply based on tool results. Images need to be rendered as ![](url)",
        ]
    )


def _function(tool: Any, path: str) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise InputError(
            f'{path} must be {{"type": "function", "function": {{"name": ..., "description": ..., '
            f'"parameters": ...}}}}, got {tool!r:.80}'
        )
    return function


def _description(function: Mapping[str, Any]) -> str:
    name = function["name"]
    parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
    return (
        f"### {name}\n\n{name}: {function.get('description') or ''} Parameters: {parameters} "
        "Format the arguments as a JSON object."
    )


# Joining --------------------------------------------------------------------------------------


def join_turns(messages: Sequence[Message]) -> list[Turn]:
    """Join calls, results and replies into the assistant's turn they belong to.

    Raises:
        InputError: a tool's result without a call before it.
    """
    turns: list[Turn] = []
    calls: tuple[Call, ...] = ()
    for is_result, group in groupby(messages, lambda message: message.role == "tool"):
        if is_result:
            results = list(group)
            if not turns or turns[-1].role != "assistant":
                raise InputError(
                    f"{results[0].path}: a tool's result must follow the assistant's call"
                )
            parts = (*turns[-1].parts, *_result_parts(_in_order(results, calls)))
            turns[-1] = Turn("assistant", parts, pending=True)
            continue
        for message in group:
            if turns and turns[-1].pending and message.role == "assistant":
                before = (*turns[-1].parts, TextPart(": "))
                turns[-1] = Turn("assistant", (*before, *_own_parts(message, goes_on=True)))
            else:
                turns.append(Turn(message.role, tuple(_own_parts(message, goes_on=False))))
            calls = message.calls
    return turns


def _own_parts(message: Message, *, goes_on: bool) -> Iterator[Part]:
    if message.role != "assistant":
        yield from message.parts
        return
    yield from _mark_given(message.parts)
    for i, call in enumerate(message.calls):
        line = "\n" if goes_on or message.parts or i else ""
        yield TextPart(f"{line}{FUNCTION}: {call.name}\n{ARGS}: {call.arguments}")


def _mark_given(parts: Iterable[Part]) -> Iterator[Part]:
    """Mark as given what lies between RESULT and RETURN in a turn written out as text."""
    given = False
    for part in parts:
        if isinstance(part, TextPart) and STAR in part.text:
            for piece in _STOPS.split(part.text):
                if piece == RESULT and not given:
                    yield TextPart(piece)  # the model's own last word before the world answers
                    given = True
                elif piece == RETURN:
                    yield TextPart(piece, given)
                    given = False
                elif piece:
                    yield TextPart(piece, given)
        else:
            yield part if isinstance(part, MediaPart) or not given else replace(part, given=True)


def _result_parts(results: Iterable[Message]) -> Iterator[Part]:
    for i, result in enumerate(results):
        yield TextPart(f"\n{RESULT}", given=i > 0)  # the first one stops the model, so it writes it
        yield TextPart(": ", given=True)
        for part in result.parts:
            yield part if isinstance(part, MediaPart) else replace(part, given=True)
    # ": " comes only with the reply: it could be one token with the word after it.
    yield TextPart(f"\n{RETURN}", given=True)


def _in_order(results: list[Message], calls: Sequence[Call]) -> list[Message]:
    """Sort results as their calls were made, where both name an id."""
    order = [call.id for call in calls]
    if None in order or any(result.call_id is None for result in results):
        return results
    for result in results:
        if result.call_id not in order:
            raise InputError(
                f"{result.path}.tool_call_id is {result.call_id!r}; the calls before it have ids "
                f"{', '.join(map(repr, order)) or 'none'}"
            )
    return sorted(results, key=lambda result: order.index(result.call_id))


# Reading back ---------------------------------------------------------------------------------


def parse_calls(text: str) -> Reply:
    """Split an assistant's answer into its words and its calls.

    What follows the last brace of a call's JSON is dropped, as is a keyword cut off at the end
    (when text is parsed while it streams in). Arguments are not decoded: models write them badly.
    """
    said, *calls = re.split(f"{FUNCTION}:?", _without_torn_keyword(text))
    said = re.sub("^: ?", "", said)  # where the model goes on after RETURN
    return Reply(said.rstrip() if calls else said, tuple(_call(call) for call in calls))


def _call(text: str) -> Call:
    name, _, arguments = _STOPS.split(text)[0].partition(ARGS)
    arguments = arguments.removeprefix(":").strip()
    if arguments.startswith("{") and "}" in arguments:
        arguments = arguments[: arguments.rindex("}") + 1]
    return Call(name.strip(), arguments)


def _without_torn_keyword(text: str) -> str:
    """Cut what may be the beginning of a keyword off the end."""
    start = text.rfind(STAR)
    tail = text[start:]
    if start >= 0 and any(w.startswith(tail) for w in (FUNCTION, ARGS, RESULT, RETURN)):
        return text[:start].rstrip("\n")
    return text
