"""Request validation: checks prompts and sampling parameters, and creates engine requests.

Before anything is computed, `RequestValidator` checks what depends on the model: that the prompt is
one of this model and fits, and that stop tokens, grammar and LoRA adapter exist. It warns of
sampling parameters without effect, and resolves parameters and stop conditions. What does not
depend on the model is checked in arguments.py. Nothing is queued here.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.engine.kv_cache.block_pool import salted_digest
from qwen2vl.engine.kv_cache.capacity import check_context
from qwen2vl.engine.request import Request
from qwen2vl.engine.sampling.grammar_matcher import GrammarCompiler
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.sampling.sampler import ResolvedSamplingParams, Sampler
from qwen2vl.errors import InputError, abbreviate
from qwen2vl.lora.multi import LoraAdapter
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import Item, ModelInput, PairSourceView
from qwen2vl.processor.tokenizer import IncrementalDetokenizer, KeepSpecial, Tokenizer
from qwen2vl.weights import GenerationDefaults

__all__ = [
    "PreparedRequest",
    "RequestValidator",
    "check_model_input",
    "find_adapter",
    "ineffective_parameters",
    "with_cache_identity",
]

logger = logging.getLogger(__name__)


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
        *,
        defaults_source: str = "generation_defaults",
    ) -> None:
        """Set up for one model; `defaults_source` is where the defaults are set, for warnings."""
        self._model = model
        self._tokenizer = tokenizer
        self._generation_defaults = generation_defaults
        self._defaults_source = defaults_source
        self._warned: set[str] = set()  # names of parameters; each is warned of once
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
        """Check that a request can be run, and warn of parameters without effect; thread-safe.

        Raises:
            InputError: the prompt is not one of this model, a token or adapter does not exist, or
                a grammar allows no output.
            CapacityError: the prompt does not fit into the context or the KV cache.
        """
        check_model_input(prompt, self._model.config)
        self.get_adapter(params.adapter)
        if params.grammar is not None:
            self._grammar_compiler.create_matcher(params.grammar)  # compiles and caches it
        assert isinstance(params.logit_bias, tuple)
        token_ids = {
            "stop_token_ids": params.stop_token_ids,
            "logit_bias": [token for token, _ in params.logit_bias],
        }
        for name, ids in token_ids.items():
            if unknown := [token for token in ids if token >= self._vocab_size]:
                raise InputError(
                    f"{name}: {unknown[0]} is not a token of this model, whose ids end at "
                    f"{self._vocab_size - 1}"
                )
        check_context(
            prompt,
            self._model.config,
            max_model_len=max_model_len,
            max_tokens=params.max_tokens,
            kv_cache_tokens=kv_cache_tokens,
        )
        self._warn_of_ineffective_parameters(params)

    def _warn_of_ineffective_parameters(self, params: SamplingParams) -> None:
        for name, text in ineffective_parameters(
            params, self._generation_defaults, self._defaults_source
        ):
            if name not in self._warned:
                self._warned.add(name)
                logger.warning("%s", text)

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
        prompt = with_cache_identity(prompt, adapter)
        return [
            Request(
                prompt,
                params,
                IncrementalDetokenizer(
                    self._tokenizer,
                    keep_special=_keep_special(params),
                ),
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


def _keep_special(params: SamplingParams) -> KeepSpecial:
    if not params.skip_special_tokens:
        return "all"
    return "none" if params.skip_grounding_tokens else "grounding"


def check_model_input(prompt: ModelInput, config: Qwen2VLConfig) -> None:
    """Check that a prompt is consistent and made for a model of this config.

    The processor builds such prompts; callers of `LLM.generate` may have edited one.

    Raises:
        InputError: tokens, positions and items do not belong together.
    """
    num_tokens, positions = len(prompt.input_ids), prompt.position_ids_3T
    last_id = config.text.vocab_size - 1
    try:
        ids = array("q", prompt.input_ids)
    except (TypeError, OverflowError):
        raise InputError("input_ids holds more than token ids; give whole numbers") from None
    if not ids:
        raise InputError("the prompt has no tokens, must have at least one; add text")
    if min(ids) < 0 or max(ids) > last_id:
        wrong = next(token for token in ids if not 0 <= token <= last_id)
        raise InputError(
            f"input_ids: {wrong} is not a token of this model, whose ids are 0 to {last_id}; use "
            "LLM.processor"
        )
    if not isinstance(positions, Tensor) or positions.shape != (3, num_tokens):
        raise InputError(
            f"position_ids_3T does not have the shape (3, {num_tokens}) that the "
            "input_ids need; use LLM.processor"
        )
    if not isinstance(prompt.cache_salt, bytes):
        raise InputError(f"cache_salt: got {abbreviate(prompt.cache_salt)}, must be bytes")
    num_placeholders = sum(item.num_tokens for item in prompt.items)
    if len(prompt.placeholder_index_M) != num_placeholders:
        raise InputError(
            f"placeholder_index_M has {len(prompt.placeholder_index_M)} entries for images and "
            f"videos of {num_placeholders} tokens; use LLM.processor"
        )


def ineffective_parameters(
    params: SamplingParams, defaults: GenerationDefaults, source: str
) -> Iterator[tuple[str, str]]:
    """Yield the name of each parameter without effect, and a text that says why.

    These are parameters of sampling where the checkpoint's defaults make it greedy. Nothing is
    reported if the caller made it greedy, by temperature 0 or top_k 1.

    Args:
        params: as the caller gave them.
        defaults: what the unset ones are.
        source: where the defaults are set.
    """
    resolved = ResolvedSamplingParams.resolve(params, defaults)
    if not resolved.is_greedy or params.temperature == 0 or params.top_k == 1:
        return
    reasons = ["sets top_k=1"] if resolved.top_k == 1 else []
    remedies = ["top_k=0"] if resolved.top_k == 1 else []
    if resolved.temperature == 0:
        reasons.insert(0, "sets temperature=0" if defaults.do_sample else "sets no do_sample=true")
        remedies.insert(0, "temperature=1")
    given = {
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p or None,
        "seed": params.seed,
        "n": params.n if params.n > 1 else None,
    }
    for name, value in given.items():
        if value is not None:
            effect = "gives equal completions" if name == "n" else "has no effect"
            yield (
                name,
                f"{name}={value} {effect}: {source} {' and '.join(reasons)} (greedy); give "
                f"{' and '.join(remedies)} to sample",
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
        raise InputError(
            f"adapter {abbreviate(name)}: this LLM was not given it, {known}; LLM(adapters=...)"
        )
    return adapters[name]


def with_cache_identity(prompt: ModelInput, adapter: LoraAdapter | None) -> ModelInput:
    """Mix into the digests of frame pairs what else embeddings belong to: adapter and cache salt.

    So the encoder cache never shares embeddings between different vision weights, nor between
    different salts.
    """
    vision_digest = b"" if adapter is None else adapter.vision_digest
    if not prompt.items or not (vision_digest or prompt.cache_salt):
        return prompt

    def mix(digest: bytes) -> bytes:
        return salted_digest(digest + vision_digest, prompt.cache_salt)

    def mixed(item: Item) -> Item:
        source = None if item.source is None else PairSourceView(item.source, map_digest=mix)
        return replace(item, pair_digests=tuple(map(mix, item.pair_digests)), source=source)

    return replace(prompt, items=tuple(map(mixed, prompt.items)))
