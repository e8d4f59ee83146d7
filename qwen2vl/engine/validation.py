"""Request validation: checks prompts and sampling parameters, and creates engine requests.

Before anything is computed, `RequestValidator` checks that stop tokens, grammar and LoRA adapter
exist and that the prompt fits, and resolves sampling parameters and stop conditions. The functions
after it normalize arguments of `LLM` methods: conversations to a list, params to one per prompt.
Nothing is queued here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NamedTuple

from qwen2vl.engine.kv_cache.capacity import check_context
from qwen2vl.engine.request import Request
from qwen2vl.engine.sampling.grammar_matcher import GrammarCompiler
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.sampling.sampler import ResolvedSamplingParams, Sampler
from qwen2vl.errors import InputError
from qwen2vl.lora.multi import LoraAdapter
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.tokenizer import IncrementalDetokenizer, Tokenizer
from qwen2vl.weights import GenerationDefaults

__all__ = [
    "Conversation",
    "PreparedRequest",
    "RequestValidator",
    "as_batch",
    "broadcast_params",
    "ends_with_assistant",
    "find_adapter",
    "with_adapter_digest",
]


Conversation = Sequence[Mapping[str, Any]]


class PreparedRequest(NamedTuple):
    """A request that was preprocessed and validated."""

    prompt: ModelInput
    params: SamplingParams
    process_seconds: float  # time that preprocessing took


class RequestValidator:
    """Validates the requests of one model and creates them."""

    def __init__(
        self,
        model: Qwen2VL,
        tokenizer: Tokenizer,
        generation_defaults: GenerationDefaults,
        adapters: Mapping[str, LoraAdapter],
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._generation_defaults = generation_defaults
        self._adapters = adapters
        eos_token_ids = generation_defaults.eos_token_ids or ()
        self._eos_token_ids = frozenset((model.config.eos_token_id, *eos_token_ids))
        self._vocab_size = model.config.text.vocab_size
        self._grammar_compiler = GrammarCompiler(
            tokenizer, end_ids=self._eos_token_ids, vocab_size=self._vocab_size
        )

    def validate(
        self,
        prompt: ModelInput,
        params: SamplingParams,
        *,
        max_model_len: int,
        kv_cache_tokens: int,
    ) -> None:
        """Check that a request can be run; thread-safe.

        Raises:
            InputError: a stop token or adapter does not exist, or a grammar allows no output.
            CapacityError: the prompt does not fit into the context or the KV cache.
        """
        self.get_adapter(params.adapter)
        if params.grammar is not None:
            self._grammar_compiler.create_matcher(
                params.grammar
            )  # compiles it, and keeps it cached
        unknown = [token for token in params.stop_token_ids if token >= self._vocab_size]
        if unknown:
            raise InputError(
                f"stop_token_ids: {unknown[0]} is not a token of this model, whose ids end at "
                f"{self._vocab_size - 1}"
            )
        check_context(
            prompt,
            self._model.config,
            max_model_len=max_model_len,
            max_tokens=params.max_tokens,
            kv_cache_tokens=kv_cache_tokens,
        )

    def get_adapter(self, name: str | None) -> LoraAdapter | None:
        """Return the adapter of that name; None for no adapter.

        Raises:
            InputError: no adapter has that name.
        """
        return find_adapter(self._adapters, name)

    def create_requests(
        self, prompt: ModelInput, params: SamplingParams, *, max_total_tokens: int, index: int
    ) -> list[Request]:
        """Create `params.n` requests, one for each sample, from a prompt that passed `validate`.

        Args:
            prompt: the prompt they share.
            params: the sampling parameters they share.
            max_total_tokens: the limit of prompt plus output tokens.
            index: the index of the first completion among those of the call.
        """
        eos_token_ids = frozenset() if params.ignore_eos else self._eos_token_ids
        adapter = self.get_adapter(params.adapter)
        prompt = with_adapter_digest(prompt, adapter)
        return [
            Request(
                prompt,
                params,
                IncrementalDetokenizer(self._tokenizer),
                self._sampler(prompt, params, sample),
                stop_token_ids=eos_token_ids | frozenset(params.stop_token_ids),
                max_model_len=max_total_tokens,
                index=index + sample,
                adapter=adapter,
            )
            for sample in range(params.n)
        ]

    def _sampler(self, prompt: ModelInput, params: SamplingParams, sample: int) -> Sampler:
        return Sampler(
            ResolvedSamplingParams.resolve(params, self._generation_defaults),
            prompt.input_ids,
            vocab_size=self._vocab_size,
            device=self._model.device,
            seed=None if params.seed is None else (params.seed + sample) % 2**64,
            num_logprobs=params.logprobs,
            matcher=None
            if params.grammar is None
            else self._grammar_compiler.create_matcher(params.grammar),
        )


def find_adapter(adapters: Mapping[str, LoraAdapter], name: str | None) -> LoraAdapter | None:
    """Return the adapter of that name; None for no adapter.

    Raises:
        InputError: no adapter has that name.
    """
    if name is None:
        return None
    if name not in adapters:
        known = f"it has {', '.join(sorted(adapters))}" if adapters else "it has none"
        raise InputError(f"adapter {name!r}: this LLM was not given it, {known}; LLM(adapters=...)")
    return adapters[name]


def with_adapter_digest(prompt: ModelInput, adapter: LoraAdapter | None) -> ModelInput:
    """Mix the adapter's digest into the item digests, if it changes the vision tower.

    So the encoder cache never shares embeddings between different vision weights.
    """
    if adapter is None or not adapter.vision_digest or not prompt.items:
        return prompt
    items = [
        replace(item, digest=blake2b(item.digest + adapter.vision_digest, digest_size=32).digest())
        for item in prompt.items
    ]
    return replace(prompt, items=tuple(items))


def as_batch(conversations: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """Return a list of conversations, given one conversation or a list of them.

    Raises:
        InputError: the argument is neither. The messages are checked by the processor.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise InputError(
            "conversations: expected a list of messages or a list of such lists, got "
            f"{type(conversations).__name__}; wrap text as "
            '[{"role": "user", "content": text}]'
        )
    if conversations and isinstance(conversations[0], Mapping):
        return [conversations]  # type: ignore[list-item]
    return list(conversations)  # type: ignore[arg-type]


def ends_with_assistant(conversation: Conversation) -> bool:
    """Whether the last message is an assistant's; the processor reports malformed messages."""
    last = conversation[-1] if conversation else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def broadcast_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Return one SamplingParams for each of `count` prompts.

    Raises:
        InputError: their number differs from `count`, or an element has another type.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InputError(f"params: got {len(params)} for {count} prompts; give one, or one each")
    unexpected = [type(one).__name__ for one in params if not isinstance(one, SamplingParams)]
    if unexpected:
        raise InputError(f"params: got {unexpected[0]}, must be SamplingParams, one or one each")
    return list(params)
