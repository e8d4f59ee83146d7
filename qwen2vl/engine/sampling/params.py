"""Sampling parameters of a request, validated on construction.

Fields left None take the checkpoint's generation defaults (generation_config.json), then those of
transformers. Names are those of transformers, or else of the OpenAI API and vLLM. Plain data.
(HF: GenerationConfig; vLLM: SamplingParams.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2vl.engine.arguments.keyword_hints import check_keywords
from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.errors import InputError, abbreviate

__all__ = ["LogitBias", "SamplingParams"]

LogitBias = tuple[tuple[int, float], ...]

MAX_TOKENS = 1_000_000  # far above every context length; catches typing errors
MAX_LOGPROBS = 20
MAX_N = 128
MAX_LOGIT_BIASES = 1024
MAX_STOPS = 32
MAX_STOP_LENGTH = 256  # characters; also an upper bound of the text that streaming holds back


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of sampling and stopping of one request.

    Raises:
        InputError: a field has the wrong type or is out of range.
    """

    temperature: float | None = None  # 0 is greedy; 1 is the model's own distribution
    top_k: int | None = None  # sample from the k most likely tokens; 0 turns it off
    top_p: float | None = None  # sample from the most likely tokens of this total probability
    min_p: float = 0.0  # minimum probability, relative to that of the most likely token
    repetition_penalty: float | None = (
        None  # above 1: tokens in prompt or output become less likely
    )
    presence_penalty: float = 0.0  # subtracted once from the logit of each token in the output
    frequency_penalty: float = 0.0  # the same, for each occurrence
    logit_bias: Mapping[int, float] | LogitBias = ()  # token id -> addend to its logit
    n: int = 1  # number of completions of the prompt
    seed: int | None = None  # the same seed and prompt give the same tokens
    max_tokens: int = 512  # limit of output tokens
    stop: str | Sequence[str] = ()  # stop strings; the output ends before the first of them
    stop_token_ids: Sequence[int] = ()  # in addition to the checkpoint's end tokens
    grammar: Grammar | None = None  # structured output: grammar of the whole output
    adapter: str | None = None  # name of a LoRA adapter of the LLM; None: the base model
    ignore_eos: bool = False  # continue after end tokens, for benchmarks
    # Drop special tokens from the text, except the six grounding tokens, from which boxes are
    # parsed (HF and vLLM drop those as well). False keeps all but the end token.
    skip_special_tokens: bool = True
    skip_grounding_tokens: bool = False  # drop the six grounding tokens, too, as HF and vLLM do
    logprobs: int | None = None  # number of most likely tokens to report at each step

    def __new__(cls, **given: Any) -> SamplingParams:
        """Refuse misspelled names with a suggestion; `__init__` assigns and checks the values."""
        check_keywords(given, cls.__dataclass_fields__, "parameter")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 10, "0 is greedy")
        if self.temperature is not None and 0 < self.temperature < 1e-3:
            raise InputError(
                f"temperature: got {self.temperature}, must be 0 (greedy) or from 0.001 to 10"
            )
        _check_number("top_p", self.top_p, 0, 1, "1 turns it off, 0 is greedy")
        # Far smaller values would make logits infinite.
        _check_number("repetition_penalty", self.repetition_penalty, 1e-3, 10, "1 turns it off")
        _check_number("min_p", self.min_p, 0, 1, "0 turns it off", required=True)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -2, 2, "0 turns it off", required=True)
        _check_integer("top_k", self.top_k, 0, None, "0 turns it off")
        _check_integer("n", self.n, 1, MAX_N, required=True)
        _check_integer("seed", self.seed, 0, 2**64 - 1)
        _check_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS, required=True)
        _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, "None turns it off")
        for name in ("ignore_eos", "skip_special_tokens", "skip_grounding_tokens"):
            if not isinstance(value := getattr(self, name), bool):
                raise InputError(f"{name}: got {abbreviate(value)}, must be True or False")
        if self.skip_grounding_tokens and not self.skip_special_tokens:
            raise InputError(
                "skip_grounding_tokens: got True with skip_special_tokens=False, which keeps all "
                "special tokens; set one of them only"
            )
        _check_grammar(self.grammar, self.ignore_eos)
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise InputError(f"adapter: got {abbreviate(self.adapter)}, must be the name of one")
        object.__setattr__(self, "logit_bias", _check_logit_bias(self.logit_bias))
        object.__setattr__(self, "stop", _check_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _check_stop_token_ids(self.stop_token_ids))


def _check_number(
    name: str,
    value: float | None,
    low: float,
    high: float,
    remark: str,
    required: bool = False,
) -> None:
    if value is None and not required:
        return
    rule = f"a number from {low} to {high} ({remark})"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name}: got {abbreviate(value)}, must be {rule}")
    if not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"{name}: got {value}, must be {rule}")


def _check_integer(
    name: str,
    value: int | None,
    low: int,
    high: int | None,
    remark: str = "",
    required: bool = False,
) -> None:
    if value is None and not required:
        return
    bound = f"at least {low}" if high is None else f"from {low} to {high}"
    rule = f"a whole number {bound}" + (f" ({remark})" if remark else "")
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name}: got {abbreviate(value)}, must be {rule}")
    if value < low or (high is not None and value > high):
        raise InputError(f"{name}: got {value}, must be {rule}")


def _check_logit_bias(given: Mapping[int, float] | LogitBias) -> LogitBias:
    """Return the biases as sorted pairs, which compare and hash."""
    if not isinstance(given, (Mapping, tuple)):
        raise InputError(
            f"logit_bias: got {abbreviate(given)}, must be token ids with their biases"
        )
    if len(given) > MAX_LOGIT_BIASES:
        raise InputError(
            f"logit_bias: got {len(given)} tokens, at most {MAX_LOGIT_BIASES} are allowed"
        )
    pairs = given.items() if isinstance(given, Mapping) else given
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(
                f"logit_bias: got {abbreviate(pair)}, must be a token id with its bias"
            )
        token, bias = pair
        if not _is_token_id(token):
            raise InputError(f"logit_bias: got {abbreviate(token)}, must be token ids (0 or above)")
        _check_number(
            f"logit_bias: token {token}", bias, -100, 100, "0 does nothing", required=True
        )
    return tuple(sorted(pairs))


def _check_grammar(grammar: Grammar | None, ignore_eos: bool) -> None:
    if grammar is None:
        return
    if not isinstance(grammar, Grammar):
        example = "such as Grammar.regex('yes|no')"
        if isinstance(grammar, Mapping) or hasattr(grammar, "model_json_schema"):
            name = getattr(grammar, "__name__", "schema")
            example = f"of this schema Grammar.json_schema({name})"
        raise InputError(f"grammar: got {abbreviate(grammar)}, must be a Grammar, {example}")
    if ignore_eos:
        raise InputError("ignore_eos: with a grammar nothing can follow the end; set it to False")


def _check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(stop, Sequence):
        raise InputError(f"stop: got {abbreviate(stop)}, must be a text or a list of texts")
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > MAX_STOPS:
        raise InputError(f"stop: got {len(texts)} texts, at most {MAX_STOPS} are allowed")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InputError(f"stop: text {number} is {abbreviate(text)}, must be a string")
        if not text:
            raise InputError(f"stop: text {number} is empty and would end every answer; remove it")
        if len(text) > MAX_STOP_LENGTH:
            raise InputError(
                f"stop: text {number} has {len(text)} characters, at most {MAX_STOP_LENGTH} "
                "are allowed"
            )
    return texts


def _check_stop_token_ids(ids: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise InputError(f"stop_token_ids: got {abbreviate(ids)}, must be a list of token ids")
    for token in ids:
        if not _is_token_id(token):
            raise InputError(
                f"stop_token_ids: got {abbreviate(token)}, must be token ids (0 or above)"
            )
    return tuple(ids)


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
