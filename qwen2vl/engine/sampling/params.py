"""What a request asks for, and what comes back.

`SamplingParams` is checked when it is made, so that nothing impossible travels further; fields
left None take the checkpoint's own habits (generation_config.json) and then transformers'.
Names are those of transformers, else of the OpenAI API and vLLM. `Completion` is one answer with
its bill: tokens, seconds, and how each picture was seen. Plain data only: no tensors, no model.
(HF: GenerationConfig.) Next room: sequence.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.errors import InputError

__all__ = ["Biases", "SamplingParams"]

Biases = tuple[tuple[int, float], ...]

MAX_TOKENS = 1_000_000  # far above every context; catches a slip of the keyboard
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
MAX_BIASES = 1024
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters; also what streaming may have to hold back


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next tokens, and when to stop.

    Raises:
        InputError: a field is of the wrong type or out of its range.
    """

    temperature: float | None = None  # 0 is greedy; 1 is the model's own distribution
    top_k: int | None = None  # draw among the k likeliest; 0 turns it off
    top_p: float | None = None  # draw among the likeliest that hold this much probability
    min_p: float = 0.0  # draw among tokens at least this likely, relative to the likeliest
    repetition_penalty: float | None = None  # above 1 makes every token seen so far less likely
    presence_penalty: float = 0.0  # taken off the score of each token of the answer so far, once
    frequency_penalty: float = 0.0  # the same, for each time that it occurred
    logit_bias: Mapping[int, float] | Biases = ()  # token id -> what is added to its score
    n: int = 1  # answers to one prompt
    seed: int | None = None  # the same seed and prompt draw the same tokens
    max_tokens: int = 512  # tokens of the answer
    stop: str | Sequence[str] = ()  # the answer ends before the first of these texts
    stop_token_ids: Sequence[int] = ()  # besides the checkpoint's own end tokens
    grammar: Grammar | None = None  # what the whole answer must look like
    adapter: str | None = None  # which of the LLM's adapters answers; None: the model alone
    ignore_eos: bool = False  # go on through end tokens, for measurements
    logprobs: int | None = None  # report this many likeliest tokens at each step

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 10, "0 is greedy")
        if self.temperature is not None and 0 < self.temperature < 1e-3:
            raise InputError(
                f"temperature: got {self.temperature}, must be 0 (greedy) or from 0.001 to 10"
            )
        _check_number("top_p", self.top_p, 0, 1, "1 turns it off", open_below=True)
        _check_number("repetition_penalty", self.repetition_penalty, 0, 10, "1 turns it off", True)
        _check_number("min_p", self.min_p, 0, 1, "0 turns it off", required=True)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -2, 2, "0 turns it off", required=True)
        _check_integer("top_k", self.top_k, 0, None, "0 turns it off")
        _check_integer("n", self.n, 1, MAX_SAMPLES, required=True)
        _check_integer("seed", self.seed, 0, 2**64 - 1)
        _check_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS, required=True)
        _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, "None turns it off")
        _check_grammar(self.grammar, self.ignore_eos)
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise InputError(f"adapter: got {_show(self.adapter)}, must be the name of one")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))


def _check_number(
    name: str,
    value: float | None,
    low: float,
    high: float,
    remark: str,
    open_below: bool = False,
    required: bool = False,
) -> None:
    if value is None and not required:
        return
    rule = f"a number {'above' if open_below else 'from'} {low} to {high} ({remark})"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name}: got {_show(value)}, must be {rule}")
    below = value <= low if open_below else value < low
    if not math.isfinite(value) or below or value > high:
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
        raise InputError(f"{name}: got {_show(value)}, must be {rule}")
    if value < low or (high is not None and value > high):
        raise InputError(f"{name}: got {value}, must be {rule}")


def _biases(given: Mapping[int, float] | Biases) -> Biases:
    """Keep the biases as sorted pairs, which compare and hash."""
    if not isinstance(given, (Mapping, tuple)):
        raise InputError(f"logit_bias: got {_show(given)}, must be token ids with their biases")
    if len(given) > MAX_BIASES:
        raise InputError(f"logit_bias: got {len(given)} tokens, at most {MAX_BIASES} are allowed")
    pairs = given.items() if isinstance(given, Mapping) else given
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(f"logit_bias: got {_show(pair)}, must be a token id with its bias")
        token, bias = pair
        if not _is_token_id(token):
            raise InputError(f"logit_bias: got {_show(token)}, must be token ids (0 or above)")
        _check_number(
            f"logit_bias: token {token}", bias, -100, 100, "0 does nothing", required=True
        )
    return tuple(sorted(pairs))


def _check_grammar(grammar: Grammar | None, ignore_eos: bool) -> None:
    if grammar is None:
        return
    if not isinstance(grammar, Grammar):
        raise InputError(
            f"grammar: got {_show(grammar)}, must be a Grammar, such as Grammar.regex('yes|no')"
        )
    if ignore_eos:
        raise InputError("ignore_eos: with a grammar nothing can follow the end; set it to False")


def _stop_texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(stop, Sequence):
        raise InputError(f"stop: got {_show(stop)}, must be a text or a list of texts")
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > MAX_STOPS:
        raise InputError(f"stop: got {len(texts)} texts, at most {MAX_STOPS} are allowed")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InputError(f"stop: text {number} is {_show(text)}, must be a string")
        if not text:
            raise InputError(f"stop: text {number} is empty and would end every answer; remove it")
        if len(text) > MAX_STOP_LENGTH:
            raise InputError(
                f"stop: text {number} has {len(text)} characters, at most {MAX_STOP_LENGTH} "
                "are allowed"
            )
    return texts


def _stop_ids(ids: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise InputError(f"stop_token_ids: got {_show(ids)}, must be a list of token ids")
    for token in ids:
        if not _is_token_id(token):
            raise InputError(f"stop_token_ids: got {_show(token)}, must be token ids (0 or above)")
    return tuple(ids)


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _show(value: object) -> str:
    """Name a value of the wrong type without pouring a megabyte into the message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
