"""Logits -> the next id of one answer.

In this order, with transformers' arithmetic: logit bias, repetition penalty, frequency and presence
penalty, grammar, temperature, top-k, top-p, min-p, one draw. Each answer has its own Sampler; its
n-th draw depends on its seed, n and the logits alone: not on what else is running, nor on the
device. Greedy with nothing else on costs one search of the vocabulary. Letter of this room: J, the
candidates that are left. It must not know text, cache or model.
(HF: SequenceBiasLogitsProcessor, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper; OpenAI: frequency and presence penalty.)
Next room: llm.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from qwen2vl.engine.outputs import TokenLogprob
from qwen2vl.engine.sampling.grammar_matcher import Matcher
from qwen2vl.engine.sampling.params import Biases, SamplingParams
from qwen2vl.errors import EngineError, InputError
from qwen2vl.weights import GenerationDefaults

__all__ = [
    "Rule",
    "Sampler",
    "not_finite",
    "penalize_occurrence",
    "penalize_repetition",
    "shortlist",
]

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How one id is chosen, with nothing left open."""

    temperature: float  # 0 is greedy
    top_k: int  # 0 is off
    top_p: float  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # 1 is off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Biases = ()

    @property
    def is_greedy(self) -> bool:
        """Tell whether there is nothing to draw; the official checkpoints' top-k of 1 is greedy."""
        return self.temperature == 0.0 or self.top_k == 1

    @classmethod
    def resolve(cls, params: SamplingParams, defaults: GenerationDefaults) -> Rule:
        """Fill what the request left open: the checkpoint's habits, then transformers'.

        A checkpoint that does not ask for sampling is greedy unless the request names a
        temperature.
        """
        habit = _first(defaults.temperature, 1.0) if defaults.do_sample else 0.0
        assert isinstance(params.logit_bias, tuple)
        return cls(
            temperature=_first(params.temperature, habit),
            top_k=_first(params.top_k, defaults.top_k, 50),
            top_p=_first(params.top_p, defaults.top_p, 1.0),
            min_p=params.min_p,
            repetition_penalty=_first(params.repetition_penalty, defaults.repetition_penalty, 1.0),
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
        )


class Sampler:
    """Choose the tokens of one answer; owns its random generator and what it has seen.

    Raises:
        InputError: a bias is for a token that the model does not have.
    """

    def __init__(
        self,
        rule: Rule,
        prompt_ids: Iterable[int],
        *,
        vocab_size: int,
        device: torch.device,
        seed: int | None = None,
        num_logprobs: int | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        self.rule = rule
        self.matcher = matcher
        self.num_logprobs = num_logprobs
        self._bias = _bias(rule.logit_bias, vocab_size, device) if rule.logit_bias else None
        self._seen_V: Tensor | None = None  # tokens of prompt and answer
        self._counts_V: Tensor | None = None  # how often each token is in the answer
        if rule.repetition_penalty != 1.0:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V[torch.tensor(sorted(set(prompt_ids)), dtype=torch.int64)] = True
        if rule.presence_penalty or rule.frequency_penalty:
            self._counts_V = torch.zeros(vocab_size, device=device)
        # On the CPU wherever the logits are: a seed means the same on every device.
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._uniform: float | None = None  # drawn, and not yet spent

    @property
    def is_plain(self) -> bool:
        """Tell whether the logits alone decide, and nothing is reported: see choose.py."""
        special = (self._bias, self._seen_V, self._counts_V, self.matcher, self.num_logprobs)
        return all(one is None for one in special)

    @property
    def finished(self) -> bool:
        """Tell whether a grammar holds, and the answer is whole; only an end token may follow."""
        return self.matcher is not None and self.matcher.finished

    def forced(self) -> list[int]:
        """Guess the tokens that a grammar dictates next; `sample` may still cut them otherwise."""
        return [] if self.matcher is None else self.matcher.forced()

    def sample(self, logits_V: Tensor) -> tuple[int, TokenLogprob | None]:
        """Choose the next id and remember it.

        Raises:
            InputError: the grammar has become too costly to follow.
            EngineError: the logits are not finite, which only damaged weights or fp16 do.
        """
        scores_V = self._adjust(logits_V)
        token, best = _likeliest(scores_V)
        if not math.isfinite(best):
            raise not_finite(best)
        if not self.rule.is_greedy:
            token = self._draw(*shortlist(scores_V, self.rule))
        self.accept(token)
        if self.num_logprobs is None:
            return token, None
        return token, _report(logits_V, token, self.num_logprobs)

    def _adjust(self, logits_V: Tensor) -> Tensor:
        """Apply what changes single scores; the logits themselves where nothing does."""
        scores_V = logits_V
        if self._bias is not None:
            scores_V = scores_V.float().index_add(0, *self._bias)
        if self._seen_V is not None:
            scores_V = penalize_repetition(
                scores_V.float(), self._seen_V, self.rule.repetition_penalty
            )
        if self._counts_V is not None:
            scores_V = penalize_occurrence(scores_V.float(), self._counts_V, self.rule)
        if self.matcher is not None:
            forbidden_V = ~self.matcher.mask().to(scores_V.device)
            scores_V = scores_V.masked_fill(forbidden_V, -math.inf)
        return scores_V

    def _draw(self, ids_J: Tensor, weights_J: Tensor) -> int:
        """Spend one number of the generator to choose by weight."""
        # In float64: among 150,000 candidates, sums in float32 lose the unlikely ones.
        bounds_J = weights_J.cpu().cumsum(0, dtype=torch.float64)
        index = torch.searchsorted(bounds_J, self.uniform() * bounds_J[-1], right=True)
        return int(ids_J[int(index)].item())

    def uniform(self) -> float:
        """Give the number in [0, 1) that decides the next draw, the same until `accept`."""
        if self._uniform is None:
            drawn = torch.rand((), dtype=torch.float64, generator=self._generator)
            self._uniform = float(drawn.item())
        return self._uniform

    def accept(self, token: int) -> None:
        """Remember the id that was chosen."""
        self._uniform = None
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._counts_V is not None:
            self._counts_V[token] += 1
        if self.matcher is not None:
            self.matcher.accept(token)


def not_finite(best: float) -> EngineError:
    """Say what scores of which the largest is `best` may come from."""
    return EngineError(
        f"the model's scores are not finite (largest {best}); its weights may be damaged: "
        "qwen2vl doctor --check-weights names such tensors; float16 overflows"
    )


def penalize_repetition(scores_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Divide positive scores of seen tokens by `penalty`, and multiply negative ones."""
    ids_J = _find(seen_V)
    scores_J = scores_V[ids_J]
    penalized_J = torch.where(scores_J < 0, scores_J * penalty, scores_J / penalty)
    return scores_V.index_copy(0, ids_J, penalized_J)


def penalize_occurrence(scores_V: Tensor, counts_V: Tensor, rule: Rule) -> Tensor:
    """Subtract the presence penalty once, and the frequency penalty for each occurrence."""
    ids_J = _find(counts_V > 0)
    costs_J = rule.presence_penalty + rule.frequency_penalty * counts_V[ids_J]
    return scores_V.index_add(0, ids_J, costs_J, alpha=-1)


def shortlist(scores_V: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """List the ids that may be drawn and their weights: temperature, top-k, top-p, min-p.

    Ties at an edge all stay.
    """
    scores_J = scores_V.float()
    if 0 < rule.top_k < len(scores_V):
        ids_J = _find(scores_J >= _kth_best(scores_J, rule.top_k))
        scores_J = scores_J[ids_J]
    else:
        ids_J = torch.arange(len(scores_V), device=scores_V.device)
    weights_J = (scores_J / rule.temperature).softmax(dim=-1)
    if rule.top_p < 1.0:
        kept_J = _find(weights_J >= _least_in_top_p(weights_J, rule.top_p))
        ids_J, weights_J = ids_J[kept_J], weights_J[kept_J]
    if rule.min_p > 0.0:
        kept_J = _find(weights_J >= rule.min_p * weights_J.max())
        ids_J, weights_J = ids_J[kept_J], weights_J[kept_J]
    return ids_J, weights_J


def _least_in_top_p(weights_J: Tensor, top_p: float) -> Tensor:
    """Find the least weight above the unlikely tail that holds at most 1 - top_p."""
    ascending_J = _sort(weights_J)
    in_tail_J = ascending_J.cumsum(dim=0) <= 1 - top_p
    # The best stays even where rounding puts the whole below 1 - top_p.
    return ascending_J[min(int(in_tail_J.sum()), len(weights_J) - 1)]


# On a CPU, numpy searches and sorts a vocabulary 10 to 40 times as fast as torch does.


def _likeliest(scores_V: Tensor) -> tuple[int, float]:
    """Find the best token and its score; NaN counts as best."""
    if scores_V.device.type == "cpu":
        values = scores_V.float().numpy()
        token = int(values.argmax())
        return token, float(values[token])
    best, token = scores_V.max(dim=-1)
    return int(token.item()), float(best.item())


def _kth_best(scores_V: Tensor, k: int) -> Tensor:
    if scores_V.device.type == "cpu":
        return torch.tensor(np.partition(scores_V.numpy(), -k)[-k])
    return scores_V.topk(k).values[-1]


def _sort(values_J: Tensor) -> Tensor:
    if values_J.device.type == "cpu":
        return torch.from_numpy(np.sort(values_J.numpy()))
    return values_J.sort().values


def _find(mask_J: Tensor) -> Tensor:
    """List where a mask is true."""
    if mask_J.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask_J.numpy()))
    return mask_J.nonzero()[:, 0]


def _bias(biases: Biases, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ids, values = zip(*biases, strict=True)
    if max(ids) >= vocab_size:
        raise InputError(
            f"logit_bias: {max(ids)} is not a token of this model, whose ids end at "
            f"{vocab_size - 1}"
        )
    return torch.tensor(ids, device=device), torch.tensor(
        values, dtype=torch.float32, device=device
    )


def _report(logits_V: Tensor, token: int, count: int) -> TokenLogprob:
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    values, ids = logprobs_V.topk(min(count, logprobs_V.shape[-1]))
    return TokenLogprob(
        token_id=token,
        logprob=float(logprobs_V[token].item()),
        top=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
    )


def _first(*values: Number | None) -> Number:
    return next(value for value in values if value is not None)
