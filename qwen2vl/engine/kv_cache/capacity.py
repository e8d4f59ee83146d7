"""Capacity checks: does a prompt fit into the context and the KV cache, and how large is the cache.

`check_context` rejects a prompt before anything is computed, with its token counts and a remedy in
the message. `num_cache_blocks` sizes the KV cache from available memory.
`out_of_memory_as_capacity_error` converts out-of-memory errors raised later to `CapacityError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.engine.kv_cache.block_pool import BLOCK_SIZE
from qwen2vl.errors import CapacityError
from qwen2vl.memory import available_memory
from qwen2vl.model import KVCache, Qwen2VL
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.tokenizer import Tokenizer

__all__ = [
    "check_context",
    "check_text_fits",
    "fitting_max_pixels",
    "num_cache_blocks",
    "out_of_memory_as_capacity_error",
]

# An image can be shrunk to 56 x 56 (4 tokens, the official min_pixels) without lowering min_pixels.
MIN_IMAGE_TOKENS = 4
# The longest token of the official vocabulary, 128 spaces: text with more characters cannot fit.
MAX_TOKEN_CHARACTERS = 128
COUNTED_CHARACTERS = 65_536  # of a piece that is tokenized to find out whether long text can fit


def check_context(
    prompt: ModelInput,
    config: Qwen2VLConfig,
    *,
    max_model_len: int,
    max_tokens: int,
    kv_cache_tokens: int | None = None,
) -> None:
    """Check that the prompt and at least one output token fit into the context and the KV cache.

    Raises:
        CapacityError: they do not fit; the message lists the prompt's token counts and a remedy.
    """
    total = len(prompt.input_ids)
    limit, limit_name, setting = max_model_len, "context", "max_model_len"
    if kv_cache_tokens is not None and kv_cache_tokens < max_model_len:
        limit, limit_name, setting = kv_cache_tokens, "cache", "kv_cache_tokens"
    if total < limit:
        return
    kinds = {"image": prompt.image_tokens, "video": prompt.video_tokens}
    parts = {"text": total - sum(kinds.values()), **{k: n for k, n in kinds.items() if n}}
    breakdown = " + ".join(f"{count:,} {kind}" for kind, count in parts.items())
    tokens = f"{total:,} = {breakdown} tokens" if len(parts) > 1 else f"{total:,} tokens"
    excess = (
        f"more than {limit:,}, the {limit_name} ({setting})"
        if total > limit
        else f"which fill the {limit_name} ({setting} {limit:,}) and leave none for the output"
    )
    remedy = _remedy(prompt, config, limit, setting, max_tokens)
    raise CapacityError(f"the prompt has {tokens}, {excess}; {remedy}")


def check_text_fits(texts: Sequence[str], tokenizer: Tokenizer, max_model_len: int) -> None:
    """Refuse text that cannot fit before all of it is tokenized, which takes seconds a megabyte.

    Long text is counted in pieces, up to twice the context: where a piece ends, a word may have a
    few more tokens than in the whole text, and what would have fitted must not be refused.

    Raises:
        CapacityError: the text has more tokens than the context.
    """
    num_characters = sum(map(len, texts))
    if num_characters <= COUNTED_CHARACTERS:
        return
    if num_characters <= max_model_len * MAX_TOKEN_CHARACTERS:
        num_tokens = 0
        for piece in _pieces(texts):
            num_tokens += len(tokenizer.encode_text(piece))
            if num_tokens > 2 * max_model_len:
                break
        else:
            return
    raise CapacityError(
        f"the prompt has {num_characters:,} characters of text, which are more than "
        f"{max_model_len:,} tokens, the context (max_model_len); shorten the text"
    )


def _pieces(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), COUNTED_CHARACTERS):
            yield text[start : start + COUNTED_CHARACTERS]


def num_cache_blocks(
    model: Qwen2VL,
    tokens: int | None,
    max_model_len: int | None = None,
    kv_cache: type[KVCache] = KVCache,
) -> int:
    """Return the number of blocks of the KV cache, of which `kv_cache` is the class.

    Without `tokens`, a quarter of the available memory, but at least one context (`max_model_len`)
    and at most sixteen contexts of the model. On a CPU blocks are allocated when needed, so the
    number is only an upper bound; on a GPU all are allocated at once.
    """
    text = model.config.text
    if tokens is None:
        available = available_memory(model.device) or 0
        tokens = available // 4 // kv_cache.bytes_per_token(text, model.dtype)
        max_context = text.max_position_embeddings
        tokens = min(max(tokens, max_model_len or max_context), 16 * max_context)
    return -(-tokens // BLOCK_SIZE)


@contextmanager
def out_of_memory_as_capacity_error(prompt: ModelInput) -> Iterator[None]:
    """Convert out-of-memory errors of the enclosed code, which processes `prompt`.

    Raises:
        CapacityError: in place of the errors of Python, torch on a CPU, or torch on a GPU.
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


def fitting_max_pixels(prompt: ModelInput, config: Qwen2VLConfig, num_tokens: int) -> int | None:
    """Return the largest max_pixels at which all images take at most `num_tokens` tokens.

    Images below the limit keep their size and leave more tokens to the larger ones. None if not
    even images of the smallest size fit.
    """
    left = num_tokens
    counts = sorted(item.num_tokens for item in prompt.items if item.kind == "image")
    for done, count in enumerate(counts):
        share = left // (len(counts) - done)
        if share < count:
            return share * config.vision.factor**2 if share >= MIN_IMAGE_TOKENS else None
        left -= count
    return None


def _remedy(
    prompt: ModelInput, config: Qwen2VLConfig, limit: int, setting: str, max_tokens: int
) -> str:
    max_context = config.text.max_position_embeddings
    others = len(prompt.input_ids) - prompt.image_tokens
    is_text_alone_too_long = others - prompt.video_tokens >= limit
    output = min(max_tokens, limit // 4)
    remedies: list[str] = []
    if prompt.image_tokens and not is_text_alone_too_long:
        pixels = fitting_max_pixels(prompt, config, limit - others - output)
        if pixels is not None:
            remedies.append(
                f"lower max_pixels to {pixels:,}, which leaves {output:,} for the output"
            )
        else:
            remedies.append("send fewer images")
    if prompt.video_tokens and not is_text_alone_too_long:
        remedies.append("send a shorter video, or lower its fps or max_pixels")
    if len(prompt.input_ids) < max_context and limit < max_context:
        remedies.append(f"raise {setting} (this model: up to {max_context:,})")
    return ", or ".join(remedies or ["shorten the text"])
