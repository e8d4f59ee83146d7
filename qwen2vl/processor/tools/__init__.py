"""Tool calling (function calling) in the format that Qwen2-VL was trained with.

`tool_prompt` writes tools, calls and results into the prompt; `tool_calls` reads the calls from a
whole output and `tool_parser` from a stream. (Qwen-Agent: qwen_fncall_prompt.)
"""

from __future__ import annotations

from qwen2vl.processor.tools.tool_calls import ParsedReply, parse_tool_calls
from qwen2vl.processor.tools.tool_parser import (
    ArgumentsDelta,
    TextDelta,
    ToolCallParser,
    ToolCallStart,
    ToolEvent,
)
from qwen2vl.processor.tools.tool_prompt import (
    STOP_WORDS,
    Turn,
    check_tools,
    describe_tools,
    merge_turns,
)

__all__ = [
    "STOP_WORDS",
    "ArgumentsDelta",
    "ParsedReply",
    "TextDelta",
    "ToolCallParser",
    "ToolCallStart",
    "ToolEvent",
    "Turn",
    "check_tools",
    "describe_tools",
    "merge_turns",
    "parse_tool_calls",
]
