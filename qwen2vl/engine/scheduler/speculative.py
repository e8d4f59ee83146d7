"""Speculative decoding by n-gram lookup: draft tokens are proposed without a draft model.

The last tokens of a request are looked up in its prompt and output so far, and in earlier outputs
for the same images and videos; the tokens that followed there become the draft. `ModelRunner`
verifies all draft tokens of a step in one forward, so rejected drafts never change the output. Each
request has a draft budget that grows with accepted tokens and shrinks with rejected ones.
(Prompt lookup decoding; vLLM: NgramProposer; HF: prompt_lookup_num_tokens.)
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

from qwen2vl.engine.request import Request

__all__ = ["NgramProposer"]

_NGRAM_LENGTHS = (6, 4, 3)  # tokens that must match, tried in this order
_INITIAL_BUDGET = 6  # draft tokens; each one proposed costs 1, each one accepted earns 4
_MAX_MEDIA_KEYS = 64  # sets of images and videos whose latest outputs are kept
_MAX_TOKENS_PER_KEY = 2048  # of those outputs
_NUM_PROMPT_TOKENS = max(_NGRAM_LENGTHS)  # kept before each output, to match its beginning
_TOKEN_BYTES = array("i").itemsize


class NgramProposer:
    """Proposes up to `num_speculative_tokens` draft tokens per step for each request."""

    def __init__(self, num_speculative_tokens: int) -> None:
        self.num_speculative_tokens = num_speculative_tokens
        self._outputs: OrderedDict[tuple[bytes, ...], list[int]] = OrderedDict()

    def propose(self, request: Request, max_tokens: int) -> list[int]:
        """Return up to `max_tokens` draft tokens for a request; often none."""
        # Tokens that the grammar determines are accepted almost always: no n-gram lookup needed.
        jump_forward = request.sampler.jump_forward_tokens()
        if jump_forward:
            return jump_forward[: max(0, min(max_tokens, self.num_speculative_tokens))]
        budget = _INITIAL_BUDGET + 4 * request.num_accepted_tokens - request.num_draft_tokens
        max_tokens = min(max_tokens, self.num_speculative_tokens, (budget + 1) // 2)
        if max_tokens <= 0:
            return []
        tokens = array("i", self._outputs.get(_media_key(request), ()))
        tokens.extend(array("i", request.all_token_ids))
        token_bytes = tokens.tobytes()
        for length in _NGRAM_LENGTHS:
            draft_tokens = _find_continuation(token_bytes, length, max_tokens)
            if draft_tokens:
                return draft_tokens
        return []

    def add_finished(self, request: Request) -> None:
        """Store the output of a finished request for later lookups, if it has images or videos."""
        key = _media_key(request)
        if not key:
            return
        start = max(0, len(request.prompt.input_ids) - _NUM_PROMPT_TOKENS)
        tokens = self._outputs.pop(key, []) + request.all_token_ids[start:]
        self._outputs[key] = tokens[-_MAX_TOKENS_PER_KEY:]
        if len(self._outputs) > _MAX_MEDIA_KEYS:
            self._outputs.popitem(last=False)


def _media_key(request: Request) -> tuple[bytes, ...]:
    return tuple(digest for item in request.prompt.items for digest in item.pair_digests)


def _find_continuation(token_bytes: bytes, ngram_length: int, max_tokens: int) -> list[int]:
    """Return the tokens after the last earlier occurrence of the final n-gram.

    The search runs over bytes, in C; a match that is not aligned to whole tokens is skipped.
    """
    ngram = token_bytes[-ngram_length * _TOKEN_BYTES :]
    end = len(token_bytes) - _TOKEN_BYTES
    while (at := token_bytes.rfind(ngram, 0, end)) >= 0:
        if at % _TOKEN_BYTES == 0:
            first = at + len(ngram)
            return array("i", token_bytes[first : first + max_tokens * _TOKEN_BYTES]).tolist()
        end = at + len(ngram) - 1
    return []
