"""Tools of a request: validation, tool_choice, and what follows for prompt, grammar and parser.

`ToolPlan.from_request` takes the fields as they are in JSON. tool_choice "auto" leaves the choice
to the model, and its output is parsed; "required", or the name of a function, is enforced by a
grammar; "none" leaves the tools out of the prompt. A function with `strict` gets arguments that
follow its schema in any mode. (OpenAI: tools, tool_choice, parallel_tool_calls; vLLM: ToolParser.)
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn, Self

from qwen2vl.engine import Grammar
from qwen2vl.engine.sampling.tool_grammar import arguments_schema, check_parameters
from qwen2vl.errors import InputError, abbreviate, suggest
from qwen2vl.processor.content import read_mapping
from qwen2vl.processor.tools import STOP_WORDS, ToolCallParser
from qwen2vl.server.protocol.chat import MAX_TOOLS

__all__ = ["ToolPlan"]

MAX_TOOLS_CHARS = 262_144  # of all definitions as JSON

Mode = Literal["none", "auto", "required"]

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FUNCTION_KEYS = frozenset({"name", "description", "parameters", "strict"})
# Where OpenAI's own tools run, and how they are loaded.
_IGNORED_KEYS = frozenset({"allowed_callers", "defer_loading", "output_schema"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """What the tools of a request mean for its prompt, its grammar and its parser."""

    tools: tuple[Mapping[str, Any], ...] | None = None  # for the prompt, in OpenAI's chat format
    mode: Mode = "none"
    names: tuple[str, ...] | None = None  # functions that may be called; None: all
    max_calls: int | None = None  # None: any number
    after_result: bool = False  # the last message is a tool's result: the output begins with ": "

    @classmethod
    def from_request(
        cls,
        tools: object,
        tool_choice: object = None,
        parallel_tool_calls: bool | None = None,
        *,
        after_result: bool = False,
        is_flat: bool = False,
    ) -> Self:
        """Validate the fields of a request.

        Args:
            tools: list of definitions, or None.
            tool_choice: "auto", "none", "required", or an object that names functions.
            parallel_tool_calls: whether several calls are allowed; None: yes.
            after_result: whether the last message is a tool's result.
            is_flat: definitions are those of the Responses API, without a nested "function".

        Raises:
            InputError: something is malformed, unknown or too large; its `param` is the path.
        """
        definitions = _read_tools(tools, is_flat)
        known = [tool["function"]["name"] for tool in definitions]
        mode, names = _read_choice(tool_choice, known, is_flat)
        if mode == "none":
            return cls(after_result=after_result)
        _check_schemas(definitions, names if mode == "required" else (), is_flat)
        is_single = parallel_tool_calls is False
        if names is not None and _is_named(tool_choice):
            is_single = True  # one call of the function, as OpenAI and vLLM make it
        elif names is not None:  # allowed_tools: the model sees no others
            definitions = [tool for tool in definitions if tool["function"]["name"] in names]
        return cls(
            tools=tuple(definitions),
            mode=mode,
            names=names,
            max_calls=1 if is_single else None,
            after_result=after_result,
        )

    @classmethod
    async def create(cls, tools: object, *args: Any, **options: Any) -> Self:
        """As `from_request`; tools are checked in a thread, because their schemas may be large."""
        work = partial(cls.from_request, tools, *args, **options)
        return await asyncio.to_thread(work) if tools else work()

    @property
    def stop(self) -> tuple[str, ...]:
        """Stop strings: the output ends where the model would invent a tool's result."""
        return STOP_WORDS if self.tools or self.after_result else ()

    def grammar(self, answer: Grammar | None = None) -> Grammar | None:
        """Return the grammar of the output; None for free text.

        Args:
            answer: the grammar that the request asks for (response_format, structured_outputs).

        Raises:
            InputError: a tool's schema cannot be obeyed, or the two cannot be combined; its
                `param` is the path.
        """
        is_strict = any(tool["function"].get("strict") for tool in self.tools or ())
        if not self.tools or (self.mode == "auto" and not is_strict and answer is None):
            return answer
        if self.mode == "auto" and answer is not None and answer.kind != "json_schema":
            _refuse(
                "tool_choice",
                'tool_choice: with tools, "auto" can be combined with a JSON schema only '
                '(response_format); use "none", or leave structured_outputs out',
            )
        return Grammar.tool_calls(
            self.tools,
            names=self.names,
            parallel=self.max_calls is None,
            after_result=self.after_result,
            allow_text=self.mode == "auto" and answer is None,
            answer=answer if self.mode == "auto" else None,
        )

    def create_parser(self) -> ToolCallParser | None:
        """Return a parser for one sample; None if its text is the answer as it is."""
        if not self.tools and not self.after_result:
            return None
        return ToolCallParser(
            after_result=self.after_result, max_calls=self.max_calls if self.tools else 0
        )


# Definitions ----------------------------------------------------------------------------------


def _read_tools(tools: object, is_flat: bool) -> list[dict[str, Any]]:
    """Return the definitions in OpenAI's chat format."""
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        _refuse("tools", f"tools: got {abbreviate(tools)}, must be a list of functions")
    if len(tools) > MAX_TOOLS:
        _refuse("tools", f"tools: got {len(tools)}, at most {MAX_TOOLS} are allowed")
    definitions = [_read_tool(tool, f"tools[{i}]", is_flat) for i, tool in enumerate(tools)]
    seen: dict[str, int] = {}
    for i, tool in enumerate(definitions):
        name = tool["function"]["name"]
        if name in seen:
            where = f"tools[{i}].name" if is_flat else f"tools[{i}].function.name"
            _refuse(where, f"{where} is {name!r}, as that of tools[{seen[name]}]; rename one")
        seen[name] = i
    size = len(json.dumps(definitions))
    if size > MAX_TOOLS_CHARS:
        _refuse(
            "tools",
            f"tools: {size:,} characters of JSON, at most {MAX_TOOLS_CHARS:,} are allowed; offer "
            "fewer tools, or shorten their schemas",
        )
    return definitions


def _read_tool(tool: object, path: str, is_flat: bool) -> dict[str, Any]:
    given = read_mapping(tool)
    if given is None:
        _refuse(path, f"{path}: got {abbreviate(tool)}, must be an object")
    kind = given.pop("type", None if is_flat else "function")
    if kind != "function":
        _refuse(
            f"{path}.type",
            f"{path}.type is {abbreviate(kind)}; only functions that the client runs exist here: "
            'give "function"',
        )
    if is_flat:
        return _read_function(given, path)
    nested = read_mapping(given.pop("function", None))
    if nested is None:
        _refuse(f"{path}.function", f"{path}.function is missing, or not an object; give it")
    _refuse_unknown(given, frozenset(), path)
    return _read_function(nested, f"{path}.function")


def _read_function(function: dict[str, Any], path: str) -> dict[str, Any]:
    """Return {"type": "function", "function": ...} of a definition."""
    _refuse_unknown(function, _FUNCTION_KEYS, path)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(
            f"{path}.name",
            f"{path}.name is {abbreviate(name)}, must be 1 to 64 letters, digits, _ or -",
        )
    if not isinstance(function.get("description", ""), str):
        _refuse(f"{path}.description", f"{path}.description must be a string")
    if not isinstance(function.get("strict", False), bool):
        _refuse(f"{path}.strict", f"{path}.strict must be true or false")
    if parameters is not None and not isinstance(parameters, Mapping):
        _refuse(
            f"{path}.parameters",
            f"{path}.parameters: got {abbreviate(parameters)}, must be a JSON schema (an object)",
        )
    check_parameters(parameters, f"{path}.parameters")
    known = {key: value for key, value in function.items() if key in _FUNCTION_KEYS}
    return {"type": "function", "function": known}


def _check_schemas(
    definitions: Sequence[Mapping[str, Any]], names: Collection[str] | None, is_flat: bool
) -> None:
    """Check the schemas that a grammar will enforce: of `names` (None: all), and with `strict`."""
    for i, tool in enumerate(definitions):
        function = tool["function"]
        if function.get("strict") or names is None or function["name"] in names:
            where = f"tools[{i}]" if is_flat else f"tools[{i}].function"
            arguments_schema(function.get("parameters"), f"{where}.parameters")


def _refuse_unknown(item: Mapping[str, Any], known: frozenset[str], path: str) -> None:
    for key in item:
        if key not in known and key not in _IGNORED_KEYS:
            where = f"{path}.{key}"
            remedy = suggest(key, known) if known else "remove it"
            _refuse(where, f"{where} is not a known field; {remedy}")


# tool_choice ----------------------------------------------------------------------------------


def _read_choice(
    choice: object, known: Sequence[str], is_flat: bool
) -> tuple[Mode, tuple[str, ...] | None]:
    """Return the mode, and the names of the functions that may be called."""
    if choice is None or choice == "auto" or choice == "none":
        return ("auto" if known and choice != "none" else "none"), None
    given = read_mapping(choice)
    kind = None if given is None else given.get("type")
    if choice != "required" and (given is None or kind not in ("function", "allowed_tools")):
        _refuse(
            "tool_choice",
            f'tool_choice: got {abbreviate(choice)}, must be "auto", "none", "required", '
            '{"type": "function", ...} or {"type": "allowed_tools", ...}'
            + ("" if known else "; and there are no tools, which all but the first two need"),
        )
    if not known:
        _refuse(
            "tool_choice",
            f"tool_choice: got {abbreviate(choice)}, but there are no tools; give tools",
        )
    if choice == "required":
        return "required", None
    assert given is not None, "checked above"
    if kind == "function":
        return "required", (_read_name(given, "tool_choice", known, is_flat),)
    return _read_allowed_tools(given, known, is_flat)


def _is_named(choice: object) -> bool:
    return (read_mapping(choice) or {}).get("type") == "function"


def _read_allowed_tools(
    given: Mapping[str, Any], known: Sequence[str], is_flat: bool
) -> tuple[Mode, tuple[str, ...]]:
    path = "tool_choice" if is_flat else "tool_choice.allowed_tools"
    allowed = given if is_flat else read_mapping(given.get("allowed_tools")) or {}
    mode, tools = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        _refuse(f"{path}.mode", f'{path}.mode is {abbreviate(mode)}, must be "auto" or "required"')
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        _refuse(f"{path}.tools", f"{path}.tools must be a list of 1 to {MAX_TOOLS} functions")
    names = [
        _read_name(read_mapping(tool) or {}, f"{path}.tools[{i}]", known, is_flat)
        for i, tool in enumerate(tools)
    ]
    return mode, tuple(dict.fromkeys(names))


def _read_name(given: Mapping[str, Any], path: str, known: Sequence[str], is_flat: bool) -> str:
    """Return the name of {"type": "function", ...}, flat or nested."""
    where = f"{path}.name" if is_flat else f"{path}.function.name"
    named = given if is_flat else read_mapping(given.get("function")) or {}
    name = named.get("name")
    if not isinstance(name, str) or name not in known:
        _refuse(
            where,
            f"{where} is {abbreviate(name)}, which no tool of the request has; "
            f"{suggest(name if isinstance(name, str) else '', known)}",
        )
    return name


def _refuse(param: str, text: str) -> NoReturn:
    raise InputError(text, param=param)
