"""Logits -> the next id of one answer.

The order and arithmetic are transformers': repetition penalty, temperature, top-k, top-p, then
one draw. Each answer has its own Sampler, so its seed owes nothing to what else is running. It
must not know text, cache or model.
(HF: RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper,
TopPLogitsWarper.) Next room: llm.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qwen2vl.engine.params import SamplingParams, TokenLogprob
from qwen2vl.errors import EngineError
from qwen2vl.weights import GenerationDefaults

__all__ = ["Rule", "Sampler", "keep_top_k", "keep_top_p", "penalise_repetition"]

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How one id is chosen, with nothing left open."""

    temperature: float  # 0 is greedy
    top_k: int  # 0 is off
    top_p: float  # 1 is off
    repetition_penalty: float  # 1 is off

    @classmethod
    def resolve(cls, params: SamplingParams, defaults: GenerationDefaults) -> Rule:
        """Fill what the request left open: the checkpoint's habits, then transformers'.

        A checkpoint that does not ask for sampling is greedy unless the request names a
        temperature.
        """
        habit = _first(defaults.temperature, 1.0) if defaults.do_sample else 0.0
        return cls(
            temperature=_first(params.temperature, habit),
            top_k=_first(params.top_k, defaults.top_k, 50),
            top_p=_first(params.top_p, defaults.top_p, 1.0),
            repetition_penalty=_first(params.repetition_penalty, defaults.repetition_penalty, 1.0),
        )


class Sampler:
    """Choose the tokens of one answer; owns its random generator and which tokens it has seen."""

    def __init__(
        self,
        rule: Rule,
        prompt_ids: Iterable[int],
        *,
        vocab_size: int,
        device: torch.device,
        seed: int | None = None,
        num_logprobs: int | None = None,
    ) -> None:
        self.rule = rule
        self.num_logprobs = num_logprobs
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self.seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.seen_V[torch.tensor(sorted(set(prompt_ids)), dtype=torch.int64, device=device)] = True

    def sample(self, logits_V: Tensor) -> tuple[int, TokenLogprob | None]:
        """Choose the next id and remember it.

        Raises:
            EngineError: the logits are not finite, which only damaged weights or fp16 do.
        """
        logits_V = logits_V.float()
        scores_V = logits_V
        if self.rule.repetition_penalty != 1.0:
            scores_V = penalise_repetition(scores_V, self.seen_V, self.rule.repetition_penalty)
        token = self._choose(scores_V)
        self.seen_V[token] = True
        report = None
        if self.num_logprobs is not None:
            report = _report(logits_V, token, self.num_logprobs)
        return token, report

    def _choose(self, scores_V: Tensor) -> int:
        best, argmax = scores_V.max(dim=-1)
        if not math.isfinite(best.item()):
            raise EngineError(
                f"the model's scores are not finite (largest {best.item()}); its weights may be "
                "damaged: qwen2vl doctor --check-weights names such tensors; float16 overflows"
            )
        if self.rule.temperature == 0.0:
            return int(argmax.item())
        scores_V = scores_V / self.rule.temperature
        if self.rule.top_k:
            scores_V = keep_top_k(scores_V, self.rule.top_k)
        if self.rule.top_p < 1.0:
            scores_V = keep_top_p(scores_V, self.rule.top_p)
        weights_V = scores_V.softmax(dim=-1)
        return int(torch.multinomial(weights_V, 1, generator=self.generator).item())


def penalise_repetition(scores_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Divide positive scores of seen tokens by `penalty`, and multiply negative ones."""
    penalised_V = torch.where(scores_V < 0, scores_V * penalty, scores_V / penalty)
    return torch.where(seen_V, penalised_V, scores_V)


def keep_top_k(scores_V: Tensor, top_k: int) -> Tensor:
    """Rule out everything below the k-th best score; ties with it stay."""
    least = scores_V.topk(min(top_k, scores_V.shape[-1])).values[..., -1]
    return scores_V.masked_fill(scores_V < least, -math.inf)


def keep_top_p(scores_V: Tensor, top_p: float) -> Tensor:
    """Rule out the unlikely tail that holds at most 1 - top_p; the best token always stays."""
    ascending_V, order_V = scores_V.sort()
    tail_V = ascending_V.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    tail_V[-1] = False
    return scores_V.masked_fill(torch.empty_like(tail_V).scatter_(0, order_V, tail_V), -math.inf)


def _report(logits_V: Tensor, token: int, count: int) -> TokenLogprob:
    logprobs_V = logits_V.log_softmax(dim=-1)
    values, ids = logprobs_V.topk(min(count, logprobs_V.shape[-1]))
    return TokenLogprob(
        token_id=token,
        logprob=float(logprobs_V[token].item()),
        top=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
    )


def _first(*values: Number | None) -> Number:
    return next(value for value in values if value is not None)
