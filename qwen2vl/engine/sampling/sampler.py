"""Sampler: logits processors and the choice of the next token of one request.

Applied in this order, with the arithmetic of transformers: logit bias, repetition penalty,
frequency and presence penalty, grammar mask, temperature, top-k, top-p, min-p, one multinomial
draw. Each sample has its own Sampler; its n-th draw depends on its seed, n and the logits alone,
not on the other requests of the batch, nor on the device. Plain greedy sampling costs one argmax.
Axis letter of this module: J, the remaining candidates.
(HF: SequenceBiasLogitsProcessor, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper; OpenAI: frequency and presence penalty.)
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
from qwen2vl.engine.sampling.grammar_matcher import GrammarMatcher
from qwen2vl.engine.sampling.params import LogitBias, SamplingParams
from qwen2vl.errors import EngineError, InputError
from qwen2vl.weights import GenerationDefaults

__all__ = [
    "NonFiniteLogitsError",
    "ResolvedSamplingParams",
    "Sampler",
    "apply_occurrence_penalties",
    "apply_repetition_penalty",
    "top_k_top_p_filter",
]

Number = TypeVar("Number", int, float)


class NonFiniteLogitsError(EngineError):
    """The logits of one request are NaN or infinite; nothing was sampled from them."""

    @classmethod
    def of(cls, best: float) -> NonFiniteLogitsError:
        """Build the error, given the largest logit."""
        return cls(
            f"the model's logits are not finite (largest {best}); its weights may be damaged: "
            "qwen2vl doctor --check-weights names such tensors; float16 overflows"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSamplingParams:
    """Sampling parameters with every default filled in."""

    temperature: float  # 0 is greedy
    top_k: int  # 0 is off
    top_p: float  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # 1 is off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: LogitBias = ()

    @property
    def is_greedy(self) -> bool:
        """Whether sampling is an argmax; top_k 1, as in the official checkpoints, is greedy."""
        return self.temperature == 0.0 or self.top_k == 1

    @classmethod
    def resolve(
        cls, params: SamplingParams, defaults: GenerationDefaults
    ) -> ResolvedSamplingParams:
        """Fill unset fields with the checkpoint's generation defaults, then with transformers'.

        A checkpoint whose generation_config.json does not set do_sample is greedy unless the
        request sets a temperature.
        """
        temperature = _first_set(defaults.temperature, 1.0) if defaults.do_sample else 0.0
        assert isinstance(params.logit_bias, tuple)
        return cls(
            temperature=_first_set(params.temperature, temperature),
            top_k=_first_set(params.top_k, defaults.top_k, 50),
            top_p=_first_set(params.top_p, defaults.top_p, 1.0),
            min_p=params.min_p,
            repetition_penalty=_first_set(
                params.repetition_penalty, defaults.repetition_penalty, 1.0
            ),
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
        )


class Sampler:
    """Samples the tokens of one output; holds its random generator, penalty state and grammar.

    Raises:
        InputError: logit_bias names a token outside the vocabulary.
    """

    def __init__(
        self,
        params: ResolvedSamplingParams,
        prompt_ids: Iterable[int],
        *,
        vocab_size: int,
        device: torch.device,
        seed: int | None = None,
        num_logprobs: int | None = None,
        matcher: GrammarMatcher | None = None,
    ) -> None:
        self.params = params
        self.matcher = matcher
        self.num_logprobs = num_logprobs
        self._logit_bias = (
            _logit_bias_tensors(params.logit_bias, vocab_size, device)
            if params.logit_bias
            else None
        )
        self._occurred_V: Tensor | None = None  # tokens that occur in prompt or output
        self._counts_V: Tensor | None = None  # occurrences of each token in the output
        if params.repetition_penalty != 1.0:
            self._occurred_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._occurred_V[torch.tensor(sorted(set(prompt_ids)), dtype=torch.int64)] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts_V = torch.zeros(vocab_size, device=device)
        # Always on the CPU, so that a seed gives the same draws whatever the device of the logits.
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._uniform: float | None = None  # drawn but not yet used

    @property
    def supports_batched_sampling(self) -> bool:
        """Whether only temperature, top-k, top-p and min-p are active, and no logprobs requested.

        See batched.py.
        """
        unsupported = (
            self._logit_bias,
            self._occurred_V,
            self._counts_V,
            self.matcher,
            self.num_logprobs,
        )
        return all(feature is None for feature in unsupported)

    @property
    def is_finished(self) -> bool:
        """Whether the grammar is complete, so that only an end token may follow."""
        return self.matcher is not None and self.matcher.is_finished

    def jump_forward_tokens(self) -> list[int]:
        """Return the tokens that the grammar forces next (jump-forward), as draft tokens.

        `sample` must verify them: it may choose another tokenization of the same text.
        """
        return [] if self.matcher is None else self.matcher.jump_forward_tokens()

    def sample(self, logits_V: Tensor) -> tuple[int, TokenLogprob | None]:
        """Sample the next token and update the sampler's state with it.

        Raises:
            InputError: the grammar exceeds its cost limits in this step.
            NonFiniteLogitsError: because of damaged weights or float16 overflow.
        """
        scores_V = self._process_logits(logits_V)
        token, best = _argmax(scores_V)
        if not math.isfinite(best):
            raise NonFiniteLogitsError.of(best)
        if not self.params.is_greedy:
            token = self._draw(*top_k_top_p_filter(scores_V, self.params))
        self.accept_token(token)
        if self.num_logprobs is None:
            return token, None
        return token, _token_logprob(logits_V, token, self.num_logprobs)

    def _process_logits(self, logits_V: Tensor) -> Tensor:
        """Apply bias, penalties and grammar mask; return the logits as they are if none is set."""
        scores_V = logits_V
        if self._logit_bias is not None:
            scores_V = scores_V.float().index_add(0, *self._logit_bias)
        if self._occurred_V is not None:
            scores_V = apply_repetition_penalty(
                scores_V.float(), self._occurred_V, self.params.repetition_penalty
            )
        if self._counts_V is not None:
            scores_V = apply_occurrence_penalties(scores_V.float(), self._counts_V, self.params)
        if self.matcher is not None:
            forbidden_V = ~self.matcher.token_mask().to(scores_V.device)
            scores_V = scores_V.masked_fill(forbidden_V, -math.inf)
        return scores_V

    def _draw(self, ids_J: Tensor, weights_J: Tensor) -> int:
        """Draw one id with probability proportional to its weight."""
        # In float64: over 150,000 candidates, float32 sums lose the unlikely ones.
        bounds_J = weights_J.cpu().cumsum(0, dtype=torch.float64)
        index = torch.searchsorted(bounds_J, self.uniform() * bounds_J[-1], right=True)
        return int(ids_J[int(index)].item())

    def uniform(self) -> float:
        """Return the random number in [0, 1) of the next draw, the same until `accept_token`."""
        if self._uniform is None:
            drawn = torch.rand((), dtype=torch.float64, generator=self._generator)
            self._uniform = float(drawn.item())
        return self._uniform

    def accept_token(self, token: int) -> None:
        """Update penalties, grammar and draw with the token that was sampled."""
        self._uniform = None
        if self._occurred_V is not None:
            self._occurred_V[token] = True
        if self._counts_V is not None:
            self._counts_V[token] += 1
        if self.matcher is not None:
            self.matcher.accept_token(token)


def apply_repetition_penalty(scores_V: Tensor, occurred_V: Tensor, penalty: float) -> Tensor:
    """Divide positive scores of tokens that occurred by `penalty`; multiply negative ones."""
    ids_J = _true_indices(occurred_V)
    scores_J = scores_V[ids_J]
    penalized_J = torch.where(scores_J < 0, scores_J * penalty, scores_J / penalty)
    return scores_V.index_copy(0, ids_J, penalized_J)


def apply_occurrence_penalties(
    scores_V: Tensor, counts_V: Tensor, params: ResolvedSamplingParams
) -> Tensor:
    """Subtract the presence penalty once and the frequency penalty per occurrence."""
    ids_J = _true_indices(counts_V > 0)
    penalties_J = params.presence_penalty + params.frequency_penalty * counts_V[ids_J]
    return scores_V.index_add(0, ids_J, penalties_J, alpha=-1)


def top_k_top_p_filter(scores_V: Tensor, params: ResolvedSamplingParams) -> tuple[Tensor, Tensor]:
    """Apply temperature, top-k, top-p and min-p; return the remaining ids and their weights.

    Ties at a threshold are all kept.
    """
    scores_J = scores_V.float()
    if 0 < params.top_k < len(scores_V):
        ids_J = _true_indices(scores_J >= _kth_largest(scores_J, params.top_k))
        scores_J = scores_J[ids_J]
    else:
        ids_J = torch.arange(len(scores_V), device=scores_V.device)
    weights_J = (scores_J / params.temperature).softmax(dim=-1)
    if params.top_p < 1.0:
        kept_J = _true_indices(weights_J >= _top_p_threshold(weights_J, params.top_p))
        ids_J, weights_J = ids_J[kept_J], weights_J[kept_J]
    if params.min_p > 0.0:
        kept_J = _true_indices(weights_J >= params.min_p * weights_J.max())
        ids_J, weights_J = ids_J[kept_J], weights_J[kept_J]
    return ids_J, weights_J


def _top_p_threshold(weights_J: Tensor, top_p: float) -> Tensor:
    """Return the smallest weight kept by top-p: above the tail that sums to at most 1 - top_p."""
    ascending_J = _sort(weights_J)
    in_tail_J = ascending_J.cumsum(dim=0) <= 1 - top_p
    # The largest is kept even if rounding makes the whole sum less than 1 - top_p.
    return ascending_J[min(int(in_tail_J.sum()), len(weights_J) - 1)]


# On a CPU, numpy searches and sorts a vocabulary 10 to 40 times as fast as torch.


def _argmax(scores_V: Tensor) -> tuple[int, float]:
    """Return the token with the largest score, and the score; NaN counts as largest."""
    if scores_V.device.type == "cpu":
        values = scores_V.float().numpy()
        token = int(values.argmax())
        return token, float(values[token])
    best, token = scores_V.max(dim=-1)
    return int(token.item()), float(best.item())


def _kth_largest(scores_V: Tensor, k: int) -> Tensor:
    if scores_V.device.type == "cpu":
        return torch.tensor(np.partition(scores_V.numpy(), -k)[-k])
    return scores_V.topk(k).values[-1]


def _sort(values_J: Tensor) -> Tensor:
    if values_J.device.type == "cpu":
        return torch.from_numpy(np.sort(values_J.numpy()))
    return values_J.sort().values


def _true_indices(mask_J: Tensor) -> Tensor:
    """Return the indices at which a mask is true."""
    if mask_J.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask_J.numpy()))
    return mask_J.nonzero()[:, 0]


def _logit_bias_tensors(
    biases: LogitBias, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    ids, values = zip(*biases, strict=True)
    if max(ids) >= vocab_size:
        raise InputError(
            f"logit_bias: {max(ids)} is not a token of this model, whose ids end at "
            f"{vocab_size - 1}"
        )
    return torch.tensor(ids, device=device), torch.tensor(
        values, dtype=torch.float32, device=device
    )


def _token_logprob(logits_V: Tensor, token: int, count: int) -> TokenLogprob:
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    values, ids = logprobs_V.topk(min(count, logprobs_V.shape[-1]))
    return TokenLogprob(
        token_id=token,
        logprob=float(logprobs_V[token].item()),
        top=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
    )


def _first_set(*values: Number | None) -> Number:
    return next(value for value in values if value is not None)
