"""Handler of /v1/responses: input items -> messages -> output items; nothing is stored.

    input items -> messages, SamplingParams, tools -> prepare -> generate -> ResponseWriter

Calls that follow the assistant's text are one message with it. Reasoning items, which clients send
back from other models, are left out: the chat template has no place for them.
(vLLM: OpenAIServingResponses.create_responses.)
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwen2vl.engine import Grammar, SamplingParams
from qwen2vl.errors import InputError, abbreviate, suggest
from qwen2vl.processor.content import GroundingPart, MediaPart, Part, read_mapping, refuse_unknown
from qwen2vl.processor.messages import Message, parse_messages
from qwen2vl.server.protocol.content import check_num_items
from qwen2vl.server.protocol.logprobs import end_token_ids
from qwen2vl.server.protocol.responses import (
    MAX_INPUT_ITEMS,
    ResponsesRequest,
    ResponsesResponse,
)
from qwen2vl.server.protocol.sampling import build_sampling_params, invalid_field
from qwen2vl.server.serving.generation import (
    check_output_fits,
    generate,
    prepare,
    whole_delta,
    with_cache_salt,
)
from qwen2vl.server.serving.responses_stream import (
    NamedEvent,
    PreparedResponse,
    ResponseWriter,
    stream_response,
)
from qwen2vl.server.serving.tool_choice import ToolPlan
from qwen2vl.server.serving.usage import media_paths
from qwen2vl.server.state import Caller, ServerState

__all__ = ["create_response", "parse_input"]


async def create_response(
    state: ServerState, body: ResponsesRequest, caller: Caller
) -> ResponsesResponse | AsyncIterator[NamedEvent]:
    """Generate the next output items of a conversation.

    Raises:
        APIError: the model is unknown, a medium may not be fetched, or the engine failed.
        InputError, CapacityError: the request cannot be answered; `param` names the part.
    """
    work = await _prepare_response(state, body, caller)
    if body.stream:
        events = stream_response(state, caller, work)
        await anext(events)  # submits the request, so that a refusal has a status
        return events
    async with generate(
        state, caller, work.prepared, began=work.began, final_only=True
    ) as generation:
        (completion,) = await generation.completions()
    writer = ResponseWriter(work)
    writer.write(whole_delta(completion))
    writer.end(completion)
    return writer.response


async def _prepare_response(
    state: ServerState, body: ResponsesRequest, caller: Caller
) -> PreparedResponse:
    began = time.perf_counter()
    adapter = state.adapter_of(body.model)
    body.check_combinations()
    messages = parse_input(body.input, body.instructions)
    plan = await ToolPlan.create(
        body.tools,
        body.tool_choice,
        body.parallel_tool_calls,
        after_result=messages[-1].role == "tool",
        is_flat=True,
    )
    params = await _build_params(state, body, plan, adapter)
    prepared = await prepare(
        state,
        with_cache_salt(caller, body.cache_salt),
        messages,
        params,
        tools=plan.tools,
        media_defaults=body.media_options(),
        grammar_param="tools" if body.text is None or body.text.format is None else "text.format",
    )
    check_output_fits(state, prepared.prompt, body.max_output_tokens, "max_output_tokens")
    tokenizer = state.engine.llm.processor.tokenizer
    return PreparedResponse(
        body=body,
        response=_new_response(body, body.model or state.config.served_model_names[0]),
        plan=plan,
        prepared=prepared,
        paths=media_paths(messages),
        tokenizer=tokenizer,
        end_ids=end_token_ids(tokenizer, body.stop_token_ids or ()),
        began=began,
    )


async def _build_params(
    state: ServerState, body: ResponsesRequest, plan: ToolPlan, adapter: str | None
) -> SamplingParams:
    def build_grammar() -> Grammar | None:
        return plan.grammar(body.text.grammar() if body.text else None)

    has_format = body.text is not None and body.text.format is not None
    is_slow = has_format or plan.tools  # normalizing a schema may take long
    return build_sampling_params(
        body,
        max_tokens=body.max_output_tokens,
        max_model_len=state.engine.llm.max_model_len,
        logprobs=body.num_logprobs,
        grammar=await asyncio.to_thread(build_grammar) if is_slow else None,
        adapter=adapter,
        stop=plan.stop,
    )


def _new_response(body: ResponsesRequest, model: str) -> ResponsesResponse:
    """Return the response of a request without output."""
    text = body.text.model_dump(exclude_none=True) if body.text else {}
    defaults = {"description": None, "parameters": None, "strict": False}
    return ResponsesResponse(
        id=f"resp_{secrets.token_hex(12)}",
        created_at=int(time.time()),
        model=model,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        temperature=body.temperature,
        text={"format": {"type": "text"}, **text},
        tool_choice="auto" if body.tool_choice is None else body.tool_choice,
        tools=[{**defaults, **tool} for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=body.top_p,
    )


# Input items ------------------------------------------------------------------------------------

_ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")
_STATUS_KEYS = frozenset({"type", "id", "status", "caller", "namespace", "async"})


def parse_input(given: object, instructions: str | None = None) -> list[Message]:
    """Parse the input of a request into messages.

    Args:
        given: a text, or a list of items.
        instructions: a system message before them.

    Raises:
        InputError: something is missing, unknown or of the wrong type; its `param` is the path.
    """
    messages: list[Message] = []
    if instructions:
        messages += parse_messages([{"role": "system", "content": instructions}])
    for i, item in enumerate(_list_items(given)):
        try:
            message = _parse_item(item, f"input[{i}]")
        except InputError as error:
            error.param = error.param or f"input[{i}]"
            raise
        if message is None:
            continue
        last = messages[-1] if messages else None
        if last and last.role == message.role == "assistant" and not message.parts:
            calls = (*last.tool_calls, *message.tool_calls)
            messages[-1] = replace(last, tool_calls=calls)
        else:
            messages.append(message)
    if not messages or (messages[-1].role == "system" and len(messages) == bool(instructions)):
        raise invalid_field("input", "is empty; give a text, or at least one message")
    return messages


def _list_items(given: object) -> Sequence[object]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}] if given else []
    if not isinstance(given, list):
        raise invalid_field("input", f"got {abbreviate(given)}, must be a text or a list of items")
    if len(given) > MAX_INPUT_ITEMS:
        raise invalid_field(
            "input", f"got {len(given):,} items, at most {MAX_INPUT_ITEMS:,} are allowed"
        )
    return check_num_items(given)


def _parse_item(item: object, path: str) -> Message | None:
    """Return the message of an item; None for items that have no place in the prompt."""
    raw = read_mapping(item)
    if raw is None:
        raise invalid_field(path, f"got {abbreviate(item)}, must be an object")
    kind = raw.get("type", "message")
    if kind == "reasoning":
        return None
    if kind == "function_call":
        return _parse_message(_function_call(raw, path), path, {})
    if kind == "function_call_output":
        return _parse_message(_function_result(raw, path), path, {".content": ".output"})
    if kind != "message":
        remedy = suggest(kind if isinstance(kind, str) else "", _ITEM_TYPES)
        if kind == "item_reference":
            remedy = "nothing is stored; send the item itself"
        raise invalid_field(f"{path}.type", f"is {abbreviate(kind)}; {remedy}")
    return _parse_message({**raw, "content": _content(raw.get("content"))}, path, {})


def _function_call(raw: Mapping[str, Any], path: str) -> dict[str, Any]:
    refuse_unknown(raw, {"call_id", "name", "arguments"}, path, _STATUS_KEYS | {"parsed_arguments"})
    function = {key: raw[key] for key in ("name", "arguments") if key in raw}
    call = {"id": _call_id(raw, path), "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}


def _function_result(raw: Mapping[str, Any], path: str) -> dict[str, Any]:
    refuse_unknown(raw, {"call_id", "output", "name"}, path, _STATUS_KEYS)
    if "output" not in raw:
        raise invalid_field(f"{path}.output", "is missing; give a text or a list of content items")
    content = _content(raw["output"])
    return {"role": "tool", "content": content, "tool_call_id": _call_id(raw, path)}


def _call_id(raw: Mapping[str, Any], path: str) -> str:
    call_id = raw.get("call_id")
    if not isinstance(call_id, str) or not call_id:
        raise invalid_field(f"{path}.call_id", "is missing, or not a string; it names the call")
    return call_id


def _content(content: Any) -> Any:
    """Return content in the processor's form: input_video, of this server, becomes video_url."""
    if not isinstance(content, list):
        return content
    return [
        {**item, "type": "video_url"}
        if isinstance(item, Mapping) and item.get("type") == "input_video"
        else item
        for item in content
    ]


def _parse_message(raw: dict[str, Any], path: str, renamed: Mapping[str, str]) -> Message:
    """Parse one message; paths in it and in errors are those of the item.

    Args:
        raw: the message, in the form of chat completions.
        path: of the item.
        renamed: parts of paths that have other names in items.
    """

    def convert(text: str) -> str:
        text = text.replace("messages[0]", path)
        for name, other in renamed.items():
            text = text.replace(f"{path}{name}", f"{path}{other}")
        return text

    try:
        (message,) = parse_messages([raw])
    except InputError as error:
        copied = type(error)(convert(str(error)))
        copied.param = convert(error.param or path)
        raise copied from error
    parts = tuple(_with_path(part, convert) for part in message.parts)
    return replace(message, parts=parts, path=path)


def _with_path(part: Part, convert: Callable[[str], str]) -> Part:
    if isinstance(part, MediaPart | GroundingPart):
        return replace(part, path=convert(part.path))
    return part
