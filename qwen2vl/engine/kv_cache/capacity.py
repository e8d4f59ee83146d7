"""Will the prompt fit? Refuses before any work is done, with the numbers and the way out.

Arithmetic on a ModelInput, and one name for memory that ran out all the same. It must not know
the model's weights or the files behind the prompt. Next room: llm.py, which asks before it encodes
anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.engine.kv_cache.block_pool import BLOCK
from qwen2vl.errors import CapacityError
from qwen2vl.memory import memory_available
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import ModelInput

__all__ = ["cache_blocks", "check_context", "fitting_max_pixels", "memory_errors_named"]

# A picture can be shrunk to 56 x 56 (the official min_pixels, 4 tokens) without lowering that too.
LEAST_IMAGE_TOKENS = 4


def check_context(
    prompt: ModelInput,
    config: Qwen2VLConfig,
    *,
    max_model_len: int,
    max_tokens: int,
    cache_tokens: int | None = None,
) -> None:
    """Make sure that the prompt and at least one token of an answer fit into context and cache.

    Raises:
        CapacityError: they do not; says how the prompt is made up and what would fit.
    """
    total = len(prompt.input_ids)
    room, place, setting = max_model_len, "context", "max_model_len"
    if cache_tokens is not None and cache_tokens < max_model_len:
        room, place, setting = cache_tokens, "cache", "cache_tokens"
    if total < room:
        return
    kinds = {"image": prompt.image_tokens, "video": prompt.video_tokens}
    parts = {"text": total - sum(kinds.values()), **{k: n for k, n in kinds.items() if n}}
    made_of = " + ".join(f"{count:,} {kind}" for kind, count in parts.items())
    excess = (
        f"> {room:,}, the {place} ({setting})"
        if total > room
        else f"fill the {place} ({setting} {room:,}) and leave no room for an answer"
    )
    remedy = _remedy(prompt, config, room, setting, max_tokens)
    raise CapacityError(f"prompt {total:,} = {made_of} tokens {excess}; {remedy}")


def cache_blocks(model: Qwen2VL, tokens: int | None, max_model_len: int | None = None) -> int:
    """Count the blocks that keys and values may take.

    By default a quarter of the memory available, but at least one prompt with its answer and at
    most sixteen whole contexts. On a CPU blocks are taken when they are needed, so the number is
    a bound and costs nothing; on a GPU all are taken at once.
    """
    text = model.config.text
    if tokens is None:
        per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        available = memory_available(model.device) or 0
        tokens = available // 4 // (per_token * model.dtype.itemsize)
        longest = text.max_position_embeddings
        tokens = min(max(tokens, max_model_len or longest), 16 * longest)
    return -(-tokens // BLOCK)


@contextmanager
def memory_errors_named(prompt: ModelInput) -> Iterator[None]:
    """Say in one line that memory ran out while `prompt` was answered.

    Raises:
        CapacityError: in place of what Python, torch on the CPU, or torch on a GPU raise.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_memory and "can't allocate memory" not in str(error):
            raise
        raise CapacityError(
            f"out of memory while answering a prompt of {len(prompt.input_ids):,} tokens; lower "
            "max_pixels or max_tokens, or close other programs"
        ) from error


def fitting_max_pixels(prompt: ModelInput, config: Qwen2VLConfig, room: int) -> int | None:
    """Find the largest max_pixels a picture at which all pictures take at most `room` tokens.

    Small pictures keep their size and leave the more to the large ones. None: not even the
    smallest pictures would fit.
    """
    left = room
    counts = sorted(item.num_tokens for item in prompt.items if item.kind == "image")
    for done, count in enumerate(counts):
        share = left // (len(counts) - done)
        if share < count:
            return share * config.vision.factor**2 if share >= LEAST_IMAGE_TOKENS else None
        left -= count
    return None


def _remedy(
    prompt: ModelInput, config: Qwen2VLConfig, room: int, setting: str, max_tokens: int
) -> str:
    longest = config.text.max_position_embeddings
    others = len(prompt.input_ids) - prompt.image_tokens
    is_text_alone_too_long = others - prompt.video_tokens >= room
    answer = min(max_tokens, room // 4)
    ways: list[str] = []
    if prompt.image_tokens and not is_text_alone_too_long:
        pixels = fitting_max_pixels(prompt, config, room - others - answer)
        if pixels is not None:
            ways.append(f"lower max_pixels to {pixels:,}, which leaves {answer:,} for the answer")
        else:
            ways.append("give fewer pictures")
    if prompt.video_tokens and not is_text_alone_too_long:
        ways.append("give a shorter clip, or lower its fps or max_pixels")
    if len(prompt.input_ids) < longest and room < longest:
        ways.append(f"raise {setting} (this model: up to {longest:,})")
    return ", or ".join(ways or ["shorten the text"])
