"""Handlers of /tokenize and /detokenize.

With messages, the tokens are those of the prompt of a chat completion, media included: they are
fetched and decoded as there. Nothing is generated. (vLLM: OpenAIServingTokenization.)
"""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from qwen2vl.processor.messages import parse_messages
from qwen2vl.server.media.options import with_media_defaults
from qwen2vl.server.protocol.logprobs import token_text
from qwen2vl.server.protocol.sampling import invalid_field
from qwen2vl.server.protocol.tokenization import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from qwen2vl.server.serving.generation import PromptSource
from qwen2vl.server.serving.tool_choice import ToolPlan
from qwen2vl.server.state import Caller, ServerState

__all__ = ["detokenize", "tokenize"]

MAX_INLINE_TOKENS = 4096  # of a response that is written in the event loop


async def tokenize(
    state: ServerState, body: TokenizeRequest, caller: Caller
) -> TokenizeResponse | Response:
    """Return the tokens of a prompt, or of the prompt of messages.

    Raises:
        APIError: the model is unknown, or a medium may not be fetched.
        InputError: the messages cannot be used; `param` names the part.
    """
    state.adapter_of(body.model)
    body.check_combinations()
    tokenizer = state.engine.llm.processor.tokenizer
    if body.prompt is None:
        tokens = await _tokenize_messages(state, body, caller)
    else:
        tokens = await asyncio.to_thread(tokenizer.encode_text, body.prompt)

    def build_response() -> TokenizeResponse:
        with_strings = body.return_token_strs
        return TokenizeResponse(
            count=len(tokens),
            max_model_len=state.engine.llm.max_model_len,
            tokens=tokens,
            token_strs=[token_text(one, tokenizer) for one in tokens] if with_strings else None,
        )

    if len(tokens) <= MAX_INLINE_TOKENS:
        return build_response()
    return await asyncio.to_thread(lambda: _to_json(build_response()))


async def detokenize(state: ServerState, body: DetokenizeRequest, _: Caller) -> DetokenizeResponse:
    """Return the text of tokens, special tokens included.

    Raises:
        APIError: the model is unknown.
        InputError: a token is not one of the model.
    """
    state.adapter_of(body.model)
    size = state.engine.llm.config.text.vocab_size
    if max(body.tokens, default=0) >= size:
        index = next(i for i, token in enumerate(body.tokens) if token >= size)
        text = f"got {body.tokens[index]}, must be a token of the model, at most {size - 1}"
        raise invalid_field(f"tokens[{index}]", text)
    tokenizer = state.engine.llm.processor.tokenizer
    text = await asyncio.to_thread(tokenizer.decode, body.tokens, keep_special="all")
    return DetokenizeResponse(prompt=text)


def _to_json(result: TokenizeResponse) -> Response:
    return Response(result.model_dump_json(), media_type="application/json")


async def _tokenize_messages(
    state: ServerState, body: TokenizeRequest, caller: Caller
) -> list[int]:
    messages = with_media_defaults(parse_messages(body.messages or []), body.media_options())
    source = PromptSource.of_messages(
        state,
        caller,
        await state.connector.resolve(messages),
        tools=(await ToolPlan.create(body.tools)).tools,
        continue_final_message=body.continue_final_message or False,
        add_generation_prompt=body.adds_generation_prompt,
    )
    return (await source.run(source.build)).input_ids
