"""A prompt and its wishes -> refused in words, or made into sequences that can be answered.

Everything that is known of a request before it is computed is decided here: whether its tokens,
its grammar and its adapter exist and its prompt fits, how its tokens are chosen, and when its
answer is over. Nothing is queued. Next room: llm.py, the door that this stands behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from qwen2vl.engine.kv_cache.capacity import check_context
from qwen2vl.engine.request import Sequence
from qwen2vl.engine.sampling.grammar_matcher import GrammarCompiler
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.sampling.sampler import Rule, Sampler
from qwen2vl.errors import InputError
from qwen2vl.lora.multi import Adapter
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.tokenizer import TextStream, Tokenizer
from qwen2vl.weights import GenerationDefaults

__all__ = [
    "Conversation",
    "Reception",
    "as_batch",
    "find_adapter",
    "is_unfinished",
    "one_each",
    "seen_through",
]


class Reception:
    """Receives the requests of one model."""

    def __init__(
        self,
        model: Qwen2VL,
        tokenizer: Tokenizer,
        generation: GenerationDefaults,
        adapters: Mapping[str, Adapter],
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._generation = generation
        self._adapters = adapters
        ends = generation.eos_token_ids or ()
        self._end_ids = frozenset((model.config.eos_token_id, *ends))
        self._vocab_size = model.config.text.vocab_size
        self._grammars = GrammarCompiler(
            tokenizer, end_ids=self._end_ids, vocab_size=self._vocab_size
        )

    def check(
        self, prompt: ModelInput, params: SamplingParams, *, max_model_len: int, cache_tokens: int
    ) -> None:
        """Refuse what cannot be answered; may run in any thread.

        Raises:
            InputError: a stop token or adapter is not there, or a grammar allows nothing.
            CapacityError: the prompt does not fit into context or cache.
        """
        self.adapter(params.adapter)
        if params.grammar is not None:
            self._grammars.start(params.grammar)  # compiled now, and kept
        strangers = [token for token in params.stop_token_ids if token >= self._vocab_size]
        if strangers:
            raise InputError(
                f"stop_token_ids: {strangers[0]} is not a token of this model, whose ids end at "
                f"{self._vocab_size - 1}"
            )
        check_context(
            prompt,
            self._model.config,
            max_model_len=max_model_len,
            max_tokens=params.max_tokens,
            cache_tokens=cache_tokens,
        )

    def adapter(self, name: str | None) -> Adapter | None:
        """Look up an adapter; None: the model alone.

        Raises:
            InputError: there is none of that name.
        """
        return find_adapter(self._adapters, name)

    def sequences(
        self, prompt: ModelInput, params: SamplingParams, *, longest: int, index: int
    ) -> list[Sequence]:
        """Make the `params.n` sequences of a request that `check` has let pass.

        Args:
            prompt: the prompt they share.
            params: what is wished of each.
            longest: tokens of prompt and answer at most.
            index: which of the answers of a call the first of them is.
        """
        ends = frozenset() if params.ignore_eos else self._end_ids
        adapter = self.adapter(params.adapter)
        prompt = seen_through(prompt, adapter)
        return [
            Sequence(
                prompt,
                params,
                TextStream(self._tokenizer),
                self._sampler(prompt, params, sample),
                end_ids=ends | frozenset(params.stop_token_ids),
                max_model_len=longest,
                index=index + sample,
                adapter=adapter,
            )
            for sample in range(params.n)
        ]

    def _sampler(self, prompt: ModelInput, params: SamplingParams, sample: int) -> Sampler:
        return Sampler(
            Rule.resolve(params, self._generation),
            prompt.input_ids,
            vocab_size=self._vocab_size,
            device=self._model.device,
            seed=None if params.seed is None else (params.seed + sample) % 2**64,
            num_logprobs=params.logprobs,
            matcher=None if params.grammar is None else self._grammars.start(params.grammar),
        )


def find_adapter(adapters: Mapping[str, Adapter], name: str | None) -> Adapter | None:
    """Look up the adapter of a request; None: the model alone.

    Raises:
        InputError: there is none of that name.
    """
    if name is None:
        return None
    if name not in adapters:
        known = f"it has {', '.join(sorted(adapters))}" if adapters else "it has none"
        raise InputError(f"adapter {name!r}: this LLM was not given it, {known}; LLM(adapters=...)")
    return adapters[name]


def seen_through(prompt: ModelInput, adapter: Adapter | None) -> ModelInput:
    """Tell a prompt's items from the same ones that another tower sees."""
    if adapter is None or not adapter.vision_digest or not prompt.items:
        return prompt
    items = [
        replace(item, digest=blake2b(item.digest + adapter.vision_digest, digest_size=32).digest())
        for item in prompt.items
    ]
    return replace(prompt, items=tuple(items))


Conversation = SequenceOf[Mapping[str, Any]]


def as_batch(conversations: Conversation | SequenceOf[Conversation]) -> list[Conversation]:
    """Tell one conversation (its first element is a message) from a list of them.

    Raises:
        InputError: neither; what its messages are is for the processor to check.
    """
    if not isinstance(conversations, SequenceOf) or isinstance(conversations, str):
        raise InputError(
            "conversations: expected a list of messages or a list of such lists, got "
            f"{type(conversations).__name__}; wrap text as "
            '[{"role": "user", "content": text}]'
        )
    if conversations and isinstance(conversations[0], Mapping):
        return [conversations]  # type: ignore[list-item]
    return list(conversations)  # type: ignore[arg-type]


def is_unfinished(conversation: Conversation) -> bool:
    """Tell whether the assistant has the last word; what is no message the processor names."""
    last = conversation[-1] if conversation else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def one_each(
    params: SamplingParams | SequenceOf[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Give each of `count` prompts its params.

    Raises:
        InputError: there are more or fewer, or something else among them.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InputError(f"params: got {len(params)} for {count} prompts; give one, or one each")
    strange = [type(wish).__name__ for wish in params if not isinstance(wish, SamplingParams)]
    if strange:
        raise InputError(f"params: got {strange[0]}, must be SamplingParams, one or one each")
    return list(params)
