"""Handler of /v1/embeddings: one L2-normalized vector for each input, as `LLM.embed` returns them.

All inputs are prepared and validated before the first forward; then the engine embeds them between
the steps of running requests, a forward's worth at a time. Vectors are encoded in a thread: those
of many inputs are megabytes of JSON. (vLLM: OpenAIServingEmbedding.create_embedding.)
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

from starlette.responses import Response
from torch import Tensor

from qwen2vl.engine import SamplingParams
from qwen2vl.errors import InputError, Qwen2VLError
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.messages import Message, parse_messages
from qwen2vl.server.protocol.embeddings import (
    MAX_INPUT_TOKENS,
    EmbeddingData,
    EmbeddingRequest,
    EmbeddingResponse,
)
from qwen2vl.server.protocol.usage import PromptTokensDetails, Usage
from qwen2vl.server.serving.generation import (
    PromptSource,
    engine_failure,
    prepare,
    prepare_prompt,
    with_cache_salt,
)
from qwen2vl.server.serving.usage import media_paths, media_usages
from qwen2vl.server.state import Caller, ServerState

__all__ = ["create_embedding"]


async def create_embedding(state: ServerState, body: EmbeddingRequest, caller: Caller) -> Response:
    """Embed raw inputs, or one conversation.

    Raises:
        APIError: the model is unknown, a medium may not be fetched, or the engine failed.
        InputError, CapacityError: an input cannot be embedded; `param` names it.
    """
    adapter = state.adapter_of(body.model)
    body.check_combinations(state.engine.llm.config.text.hidden_size)
    params = SamplingParams(max_tokens=1, adapter=adapter)
    salted = with_cache_salt(caller, body.cache_salt)
    messages: list[Message] = []
    if body.messages is None:
        prompts = await _prepare_inputs(state, salted, body, params)
    else:
        messages = parse_messages(body.messages)
        prompts = [await _prepare_messages(state, salted, body, messages, params)]
    try:
        vectors_SD = await state.engine.embed(
            prompts, pooling=body.pooling or "last", adapter=adapter
        )
    except Qwen2VLError as error:
        raise engine_failure(state, caller, error) from error
    state.metrics.observe_prompts([len(prompt.input_ids) for prompt in prompts])
    return await asyncio.to_thread(
        _encode_response,
        vectors_SD,
        model=body.model or state.config.served_model_names[0],
        is_base64=body.encoding_format == "base64",
        usage=_build_usage(prompts, messages),
    )


async def _prepare_inputs(
    state: ServerState, caller: Caller, body: EmbeddingRequest, params: SamplingParams
) -> list[ModelInput]:
    """Build and validate the prompt of each raw input."""
    inputs = body.input or []
    is_list = len(inputs) > 1
    prompts: list[ModelInput] = []
    total = 0
    for index, one in enumerate(inputs):
        param = f"input[{index}]" if is_list else "input"
        prompts.append(await _prepare_input(state, caller, one, params, param))
        total += len(prompts[-1].input_ids)
        if total > MAX_INPUT_TOKENS:
            raise _too_many_tokens(param, total)
    return prompts


async def _prepare_input(
    state: ServerState,
    caller: Caller,
    one: str | list[int],
    params: SamplingParams,
    param: str,
) -> ModelInput:
    if not one:
        raise InputError(f"{param} is empty; give a text", param=param)
    source = PromptSource.of_prompt(state, caller, one, param)
    if source.is_short:
        await asyncio.sleep(0)  # other requests go on between two of thousands of inputs
    return (await prepare_prompt(state, source, params)).prompt


async def _prepare_messages(
    state: ServerState,
    caller: Caller,
    body: EmbeddingRequest,
    messages: Sequence[Message],
    params: SamplingParams,
) -> ModelInput:
    prepared = await prepare(
        state,
        caller,
        messages,
        params,
        continue_final_message=body.continue_final_message or False,
        add_generation_prompt=body.adds_generation_prompt,
        media_defaults=body.media_options(),
    )
    return prepared.prompt


def _too_many_tokens(param: str, total: int) -> InputError:
    return InputError(
        f"{param}: the inputs up to here have {total:,} tokens, the limit of a request is "
        f"{MAX_INPUT_TOKENS:,}; send fewer at once",
        param=param,
    )


def _build_usage(prompts: Sequence[ModelInput], messages: Sequence[Message]) -> Usage:
    total = sum(len(prompt.input_ids) for prompt in prompts)
    items = [item for prompt in prompts for item in prompt.items]
    return Usage(
        prompt_tokens=total,
        completion_tokens=0,
        total_tokens=total,
        prompt_tokens_details=PromptTokensDetails(
            image_tokens=sum(prompt.image_tokens for prompt in prompts),
            video_tokens=sum(prompt.video_tokens for prompt in prompts),
        ),
        media=media_usages(items, media_paths(messages)),
    )


def _encode_response(vectors_SD: Tensor, *, model: str, is_base64: bool, usage: Usage) -> Response:
    """Return the response with the vectors as lists of numbers, or as base64 of float32."""
    vectors: list[list[float]] | list[str]
    if is_base64:
        rows = vectors_SD.numpy().astype("<f4")  # little-endian on every machine
        vectors = [base64.b64encode(row.tobytes()).decode() for row in rows]
    else:
        vectors = vectors_SD.tolist()
    data = [EmbeddingData(index=index, embedding=one) for index, one in enumerate(vectors)]
    result = EmbeddingResponse(data=data, model=model, usage=usage)
    return Response(result.model_dump_json(), media_type="application/json")
