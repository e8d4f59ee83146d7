"""Parser of tool calls in the assistant's output, as a whole; the reference of tool_parser.py.

    text ... FUNCTION: name \\n ARGS: {"a": 1} \\n FUNCTION: name \\n ARGS: {...} \\n RESULT

Text before the first call is the answer; text between and after calls is dropped. A name ends at
the end of its line. Arguments that begin with a brace end at the brace that closes it, others at
the next keyword. Inside a JSON string only a keyword at the start of a line counts, since JSON has
no line breaks in strings: so a string may quote a keyword, and an unclosed one does not hide the
next call. Several ARGS of one FUNCTION are several calls. RESULT and RETURN end the output, and an
incomplete keyword at its end is dropped. Arguments are not decoded: models often write invalid
JSON. (Qwen-Agent: postprocess_fncall_messages; vLLM: ToolParser.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qwen2vl.processor.messages import ToolCall
from qwen2vl.processor.tools.tool_prompt import ARGS, FUNCTION, RESULT, RETURN

__all__ = ["ParsedReply", "parse_tool_calls"]


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """Assistant output split into text and tool calls."""

    text: str
    tool_calls: tuple[ToolCall, ...] = ()


_KEYWORDS = (FUNCTION, ARGS, RESULT, RETURN)
_KEYWORD = "|".join(_KEYWORDS)
_PREFIXES = {keyword[:size] for keyword in _KEYWORDS for size in range(1, len(keyword))}
_PARTIAL = rf"(?:{'|'.join(sorted(_PREFIXES, key=len, reverse=True))})\Z"

_ANY_KEYWORD = re.compile(f"{_KEYWORD}|{_PARTIAL}")
_LINE_START_KEYWORD = re.compile(f"\n(?:{_KEYWORD}|{_PARTIAL})")
# A string that may be cut, a brace, or a keyword.
_JSON_TOKEN = re.compile(
    rf'(?s:"(?:[^"\\]|\\.)*(?:"|\\?\Z))|[{{}}]|(?P<keyword>{_KEYWORD}|{_PARTIAL})'
)


def parse_tool_calls(text: str, *, after_result: bool = True) -> ParsedReply:
    """Split assistant output into text and tool calls; the module's docstring has the rules.

    Args:
        text: the output, whole or as far as it has been generated.
        after_result: the output may follow a tool's result: a colon at its start is dropped.
    """
    if after_result:
        text = re.sub("^: ?", "", text)
    # ARGS without a FUNCTION before it is text.
    found = next((found for found in _ANY_KEYWORD.finditer(text) if found[0] != ARGS), None)
    if found is None:
        return ParsedReply(text)
    content = text[: found.start()].rstrip()
    return ParsedReply(content, tuple(_read_calls(text[found.start() :])))


def _read_calls(text: str) -> Iterator[ToolCall]:
    """Yield the calls of a text that begins with a keyword, or with a part of one."""
    name = ""
    while (found := _ANY_KEYWORD.match(text)) and found[0] in (FUNCTION, ARGS):
        rest = re.sub(r"\A:?\s*", "", text[found.end() :])
        if found[0] == FUNCTION:
            name, text = _read_name(rest)
            if name and not text.startswith(ARGS):
                yield ToolCall(name, "")
        else:
            arguments, text = _read_arguments(rest)
            if name:
                yield ToolCall(name, arguments)


def _read_name(text: str) -> tuple[str, str]:
    """Return the name at the start of a text, and the text from the next keyword on."""
    end = _start_of(_ANY_KEYWORD.search(text), text)
    return text[:end].partition("\n")[0].strip(), text[end:]


def _read_arguments(text: str) -> tuple[str, str]:
    """Return the arguments at the start of a text, and the text from the next keyword on."""
    end = _end_of_object(text) if text.startswith("{") else 0
    if end == 0:
        end = _start_of(_ANY_KEYWORD.search(text), text)
    after = _start_of(_ANY_KEYWORD.search(text, end), text)
    return text[:end].strip(), text[after:]


def _end_of_object(text: str) -> int:
    """Return where a JSON object ends: behind its closing brace, or before a keyword."""
    limit = _start_of(_LINE_START_KEYWORD.search(text), text)
    depth = 0
    for token in _JSON_TOKEN.finditer(text[:limit]):
        # A part of a keyword counts only at the end of the output.
        if token["keyword"] is not None and (token[0] in _KEYWORDS or token.end() == len(text)):
            return token.start()
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return limit


def _start_of(found: re.Match[str] | None, text: str) -> int:
    return len(text) if found is None else found.start()
