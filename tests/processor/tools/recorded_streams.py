"""Outputs in the official format of tool calls, split as a tokenizer splits them.

nano was not trained to call tools, and no official checkpoint is at hand: the texts follow the
format of Qwen2-VL sec. 2.2.1 and of Qwen-Agent's tests; `pieces` are words, digits, punctuation and
the three parts of each keyword, as in the official vocabulary.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from qwen2vl.processor.messages import ToolCall
from qwen2vl.processor.tools import ParsedReply

__all__ = ["STREAMS", "RecordedStream"]

STAR = "\u273f"
F, A, RESULT, RETURN = (f"{STAR}{w}{STAR}" for w in ("FUNCTION", "ARGS", "RESULT", "RETURN"))
NESTED = {
    "filter": {"any": [{"tag": "a}b"}, {"tag": '"{"'}], "path": "C:\\{x}\\"},
    "limit": 3,
}
QUOTED = {"text": f"write {F}: f and {A}: {{}} as text"}


@dataclass(frozen=True, slots=True)
class RecordedStream:
    """An output, and how it is to be read."""

    name: str
    text: str
    reply: ParsedReply
    finish_reason: Literal["stop", "length"] = "stop"

    @property
    def pieces(self) -> list[str]:
        """The text, token by token."""
        return re.findall(rf"{STAR}|[A-Z]{{4,}}| ?[^\W\d_]+|\d|\s+|.", self.text, re.DOTALL)


def _calls(*calls: tuple[str, str]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(name, arguments) for name, arguments in calls)


STREAMS = (
    RecordedStream(
        "one call",
        f'{F}: get_weather\n{A}: {{"city": "Paris", "unit": "celsius"}}\n',
        ParsedReply("", _calls(("get_weather", '{"city": "Paris", "unit": "celsius"}'))),
    ),
    RecordedStream(
        "parallel calls",
        f'{F}: get_weather\n{A}: {{"city": "Paris"}}\n{F}: get_weather\n{A}: {{"city": "Rome"}}\n'
        f"{F}: get_time\n{A}: {{}}\n",
        ParsedReply(
            "",
            _calls(
                ("get_weather", '{"city": "Paris"}'),
                ("get_weather", '{"city": "Rome"}'),
                ("get_time", "{}"),
            ),
        ),
    ),
    RecordedStream(
        "text before a call",
        f'I need to open the settings first.\n{F}: tap\n{A}: {{"point": [348, 291]}}\n',
        ParsedReply("I need to open the settings first.", _calls(("tap", '{"point": [348, 291]}'))),
    ),
    RecordedStream(
        "after a result",
        f": It is cold in Paris.\n{F}: get_time\n{A}: {{}}\n",
        ParsedReply("It is cold in Paris.", _calls(("get_time", "{}"))),
    ),
    RecordedStream(
        "answer after a result",
        ": It is 3 \u00b0C and sunny.",
        ParsedReply("It is 3 \u00b0C and sunny."),
    ),
    RecordedStream(
        "malformed arguments",
        f"{F}: tap\n{A}: {{\"point\": (348,291), 'label': \"ok}}\n{F}: get_time\n{A}: {{}}",
        ParsedReply(
            "", _calls(("tap", "{\"point\": (348,291), 'label': \"ok}"), ("get_time", "{}"))
        ),
    ),
    RecordedStream(
        "not an object", f"{F}: tap\n{A}: 348, 291 \n", ParsedReply("", _calls(("tap", "348, 291")))
    ),
    RecordedStream("no name", f"Hm.\n{F}:\n{A}: {{}}\n", ParsedReply("Hm.")),
    RecordedStream(
        "cut in the arguments",
        f'Let me look.\n{F}: search\n{A}: {{"query": "cats and ',
        ParsedReply("Let me look.", _calls(("search", '{"query": "cats and'))),
        "length",
    ),
    RecordedStream(
        "cut in a keyword", f"Let me look.\n{STAR}FUNCTION", ParsedReply("Let me look."), "length"
    ),
    RecordedStream(
        "nested JSON and braces in strings",
        f"{F}: search\n{A}: {json.dumps(NESTED)}\n{F}: get_time\n{A}: {{}}\n",
        ParsedReply("", _calls(("search", json.dumps(NESTED)), ("get_time", "{}"))),
    ),
    RecordedStream(
        "keywords in strings",
        f"{F}: note\n{A}: {json.dumps(QUOTED, ensure_ascii=False)}\n",
        ParsedReply("", _calls(("note", json.dumps(QUOTED, ensure_ascii=False)))),
    ),
    RecordedStream(
        "text after the arguments",
        f'{F}: tap\n{A}: {{"x": 1}}  # {{not}} part of it }}\n{F}: get_time\n{A}: {{}} done',
        ParsedReply("", _calls(("tap", '{"x": 1}'), ("get_time", "{}"))),
    ),
    RecordedStream(
        "several arguments of one name",
        f'{F}: tap\n{A}: {{"x": 1}}\n{A}: {{"x": 2}}\n',
        ParsedReply("", _calls(("tap", '{"x": 1}'), ("tap", '{"x": 2}'))),
    ),
    RecordedStream(
        "unicode",
        f"\u597d\u7684 \U0001f44d\n{F}: \u5929\u6c14\n"
        f'{A}: {{"\u57ce\u5e02": "\u5df4\u9ece \u273f"}}\n',
        ParsedReply(
            "\u597d\u7684 \U0001f44d",
            _calls(("\u5929\u6c14", '{"\u57ce\u5e02": "\u5df4\u9ece \u273f"}')),
        ),
    ),
    RecordedStream(
        "plain text", f"A flower: {STAR}, or {STAR}{STAR}.\n\n  End \n",
        ParsedReply(f"A flower: {STAR}, or {STAR}{STAR}.\n\n  End \n"),
    ),
    RecordedStream("nothing", "", ParsedReply("")),
)  # fmt: skip
