"""Streaming parser of tool calls: output text in pieces -> text, names and arguments of calls.

The events of a stream, joined, equal what `tool_calls.parse_tool_calls` returns for the whole text;
that module has the rules of the format. (vLLM: ToolParser.extract_tool_calls_streaming.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

from qwen2vl.processor.tools.tool_prompt import ARGS, FUNCTION, RESULT, RETURN, STAR

__all__ = ["ArgumentsDelta", "TextDelta", "ToolCallParser", "ToolCallStart", "ToolEvent"]

_KEYWORDS = (FUNCTION, ARGS, RESULT, RETURN)
_KEYWORD = re.compile("|".join(_KEYWORDS))


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call begins; its arguments follow."""

    index: int  # which call of the answer, from 0
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """New text of the arguments of a tool call."""

    index: int
    text: str


ToolEvent = TextDelta | ToolCallStart | ArgumentsDelta


class _State(Enum):
    TEXT = auto()  # of the answer
    NAME = auto()
    ARGUMENTS = auto()
    BETWEEN = auto()  # behind a name or arguments: skip to the next keyword
    END = auto()


class ToolCallParser:
    """Parses one output as a stream.

    Held back are only whitespace, until it is known not to end the text or the arguments, and what
    may become a keyword.
    """

    def __init__(self, *, after_result: bool = True, max_calls: int | None = None) -> None:
        """Set up for one output.

        Args:
            after_result: the output may follow a tool's result: a colon at its start is dropped.
            max_calls: drop further calls (OpenAI: 1 if parallel_tool_calls is false).
        """
        self.num_calls = 0
        self._max_calls = max_calls
        self._events: list[ToolEvent] = []
        self._state = _State.TEXT
        self._partial = ""  # may become a keyword
        self._last_char = ""  # before the partial keyword
        self._prefix = ": " if after_result else ""  # dropped if the text begins with it
        self._space = _TrailingSpace()
        self._name = ""
        self._has_arguments = False  # whether the latest call has
        self._json: _JsonObject | None = None  # of arguments that begin with a brace
        self._is_leading = False  # nothing but whitespace since the keyword

    def feed(self, delta: str) -> list[ToolEvent]:
        """Return the events of new text."""
        buffer = self._partial + delta
        position = 0
        for found in _KEYWORD.finditer(buffer):
            self._feed_text(buffer[position : found.start()])
            self._feed_keyword(found[0])
            position = found.end()
        end = _start_of_partial_keyword(buffer, position)
        self._feed_text(buffer[position:end])
        self._partial = buffer[end:]
        return self._take_events()

    def finish(self) -> list[ToolEvent]:
        """Return the events of what was held back, at the end of the output."""
        if self._partial and self._is_quoted():
            self._feed_text(self._partial)
        elif not self._partial and self._state is _State.TEXT:
            self._emit_text(self._space.flush())
        self._end_name()
        self._state, self._partial = _State.END, ""
        return self._take_events()

    def _take_events(self) -> list[ToolEvent]:
        events, self._events = self._events, []
        return events

    def _is_quoted(self) -> bool:
        """Return whether a keyword at this place is part of a JSON string."""
        in_string = self._json is not None and self._json.in_string
        return in_string and self._last_char != "\n"

    def _feed_keyword(self, keyword: str) -> None:
        if self._is_quoted() or (self._state is _State.TEXT and keyword == ARGS):
            self._feed_text(keyword)
            return
        self._last_char = STAR
        self._end_name()
        if self._state is _State.END:
            return
        self._json, self._prefix, self._is_leading = None, ":", True
        if keyword == FUNCTION:
            self._state, self._name = _State.NAME, ""
        elif keyword == ARGS:
            self._start_arguments()
        else:
            self._state = _State.END

    def _start_arguments(self) -> None:
        self._state, self._space = _State.ARGUMENTS, _TrailingSpace()
        if not self._name:
            self._state = _State.BETWEEN
        elif self._has_arguments:  # further arguments of one name are a further call
            self._start_call()
        self._has_arguments = True

    def _start_call(self) -> None:
        if self.num_calls == self._max_calls:
            self._state = _State.END
            return
        self._events.append(ToolCallStart(self.num_calls, self._name))
        self.num_calls += 1
        self._has_arguments = False

    def _end_name(self) -> None:
        if self._state is _State.NAME:
            self._state, self._name = _State.BETWEEN, self._name.strip()
            if self._name:
                self._start_call()

    def _feed_text(self, text: str) -> None:
        """Process text without keywords."""
        if not text:
            return
        self._last_char = text[-1]
        if self._state in (_State.BETWEEN, _State.END):
            return
        if self._prefix:
            text = self._drop_prefix(text)
        if self._state is _State.TEXT:
            self._emit_text(self._space.push(text))
        else:
            if self._is_leading:
                text = text.lstrip()
            if text:
                self._feed_call(text)

    def _drop_prefix(self, text: str) -> str:
        for char in text[: len(self._prefix)]:
            if not self._prefix.startswith(char):
                self._prefix = ""
                break
            text, self._prefix = text[1:], self._prefix[1:]
        return text

    def _feed_call(self, text: str) -> None:
        """Process text of a name or of arguments, which has begun."""
        if self._state is _State.NAME:
            self._is_leading = False
            line, newline, _ = text.partition("\n")
            self._name += line
            if newline:
                self._end_name()
            return
        if self._is_leading and text[0] == "{":
            self._json = _JsonObject()
        self._is_leading = False
        if self._json is not None:
            text = text[: self._json.scan(text)]
            if self._json.is_closed:
                self._state, self._json = _State.BETWEEN, None
        if text := self._space.push(text):
            self._events.append(ArgumentsDelta(self.num_calls - 1, text))

    def _emit_text(self, text: str) -> None:
        if text:
            self._events.append(TextDelta(text))


class _TrailingSpace:
    """Holds back whitespace until something follows it."""

    def __init__(self) -> None:
        self._held: list[str] = []

    def push(self, text: str) -> str:
        """Add text; return what is no longer held back."""
        visible = text.rstrip()
        if not visible:
            self._held.append(text)
            return ""
        self._held.append(visible)
        released = self.flush()
        self._held.append(text[len(visible) :])
        return released

    def flush(self) -> str:
        """Return what is held back."""
        text = "".join(self._held)
        self._held.clear()
        return text


class _JsonObject:
    """Finds the brace that closes a JSON object; braces in strings do not count."""

    def __init__(self) -> None:
        self.in_string = False
        self.is_closed = False
        self._is_escaped = False
        self._depth = 0

    def scan(self, text: str) -> int:
        """Read more of the object; return how many characters belong to it."""
        for position, char in enumerate(text, 1):
            if self.in_string:
                self._scan_string(char)
            elif char == '"':
                self.in_string = True
            elif char in "{}":
                self._depth += 1 if char == "{" else -1
                if self._depth == 0:
                    self.is_closed = True
                    return position
        return len(text)

    def _scan_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self.in_string = False


def _start_of_partial_keyword(text: str, position: int) -> int:
    """Return where the end of a text, after `position`, may be the beginning of a keyword."""
    start = text.rfind(STAR, position)
    if start >= 0 and any(keyword.startswith(text[start:]) for keyword in _KEYWORDS):
        return start
    return len(text)
