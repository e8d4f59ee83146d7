"""Handler of /v1/chat/completions.

    body -> SamplingParams, grammar, tools -> prepare -> generate -> response, or chat_stream.py

(vLLM: OpenAIServingChat.create_chat_completion.)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from qwen2vl.engine import Completion, SamplingParams
from qwen2vl.processor.messages import parse_messages
from qwen2vl.processor.tools import ArgumentsDelta, TextDelta, ToolCallParser
from qwen2vl.server.protocol.chat import (
    ChatChoice,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatMessage,
    FunctionCall,
    ToolCallResult,
)
from qwen2vl.server.protocol.logprobs import end_token_ids
from qwen2vl.server.protocol.sampling import build_sampling_params
from qwen2vl.server.serving.chat_stream import (
    PreparedChat,
    chat_finish_reason,
    new_call_id,
    stream_chat,
)
from qwen2vl.server.serving.generation import (
    check_output_fits,
    check_samples,
    generate,
    prepare,
    whole_delta,
    with_cache_salt,
)
from qwen2vl.server.serving.tool_choice import ToolPlan
from qwen2vl.server.serving.usage import build_usage, media_paths
from qwen2vl.server.state import Caller, ServerState

__all__ = ["create_chat_completion"]


async def create_chat_completion(
    state: ServerState, body: ChatCompletionRequest, caller: Caller
) -> ChatCompletionResponse | AsyncIterator[str]:
    """Generate the next assistant message of a conversation.

    Raises:
        APIError: the model is unknown, a medium may not be fetched, or the engine failed.
        InputError, CapacityError: the request cannot be answered; `param` names the part.
    """
    chat = await _prepare_chat(state, body, caller)
    if body.stream:
        events = stream_chat(state, caller, chat)
        await anext(events)  # submits the request, so that a refusal has a status
        return events
    async with generate(
        state, caller, chat.prepared, began=chat.began, final_only=True
    ) as generation:
        completions = await generation.completions()
    return ChatCompletionResponse(
        id=chat.id,
        created=chat.created,
        model=chat.model,
        choices=[_choice(chat, index, one) for index, one in enumerate(completions)],
        usage=build_usage(completions, chat.paths),
        prompt_token_ids=chat.prepared.prompt.input_ids if body.return_token_ids else None,
    )


async def _prepare_chat(
    state: ServerState, body: ChatCompletionRequest, caller: Caller
) -> PreparedChat:
    began = time.perf_counter()
    adapter = state.adapter_of(body.model)
    body.check_combinations()
    messages = parse_messages(body.messages)
    plan = await ToolPlan.create(
        body.tools,
        body.tool_choice,
        body.parallel_tool_calls,
        after_result=messages[-1].role == "tool",
    )
    params = await _build_params(state, body, plan, adapter)
    check_samples(state, params)
    prepared = await prepare(
        state,
        with_cache_salt(caller, body.cache_salt),
        messages,
        params,
        tools=plan.tools,
        continue_final_message=body.continue_final_message or False,
        add_generation_prompt=body.adds_generation_prompt,
        media_defaults=body.media_options(),
        grammar_param=body.grammar_path or "tools",
    )
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    check_output_fits(state, prepared.prompt, getattr(body, param), param)
    tokenizer = state.engine.llm.processor.tokenizer
    return PreparedChat(
        body=body,
        model=body.model or state.config.served_model_names[0],
        plan=plan,
        prepared=prepared,
        paths=media_paths(messages),
        tokenizer=tokenizer,
        end_ids=end_token_ids(tokenizer, body.stop_token_ids or ()),
        began=began,
    )


async def _build_params(
    state: ServerState, body: ChatCompletionRequest, plan: ToolPlan, adapter: str | None
) -> SamplingParams:
    if body.constrains_output or plan.tools:  # normalizing a schema may take long
        grammar = await asyncio.to_thread(lambda: plan.grammar(body.grammar()))
    else:
        grammar = None
    return build_sampling_params(
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        max_model_len=state.engine.llm.max_model_len,
        logprobs=body.num_logprobs,
        grammar=grammar,
        adapter=adapter,
        stop=plan.stop,
    )


def _choice(chat: PreparedChat, index: int, completion: Completion) -> ChatChoice:
    message, num_calls = _message(completion.text, chat.plan.create_parser())
    message.grounding = chat.groundings(list(completion.token_ids))
    whole = whole_delta(completion, index)
    return ChatChoice(
        index=index,
        message=message,
        logprobs=chat.logprobs(whole),
        finish_reason=chat_finish_reason(completion.finish_reason, num_calls),
        stop_reason=chat.stop_reason(whole),
        token_ids=list(completion.token_ids) if chat.body.return_token_ids else None,
    )


def _message(text: str, parser: ToolCallParser | None) -> tuple[ChatMessage, int]:
    """Return the message of an output, and the number of its tool calls."""
    if parser is None:
        return ChatMessage(content=text), 0
    content: list[str] = []
    calls: list[ToolCallResult] = []
    for event in (*parser.feed(text), *parser.finish()):
        if isinstance(event, TextDelta):
            content.append(event.text)
        elif isinstance(event, ArgumentsDelta):
            calls[event.index].function.arguments += event.text
        else:
            function = FunctionCall(name=event.name, arguments="")
            calls.append(ToolCallResult(id=new_call_id(), function=function))
    answer = "".join(content)
    message = ChatMessage(content=answer if answer or not calls else None, tool_calls=calls or None)
    return message, len(calls)
