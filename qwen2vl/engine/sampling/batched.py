"""Batched sampling: the next tokens of many requests at once, on the device of the logits.

On a GPU every access to a logit synchronizes with the device. Requests without penalties, bias,
grammar and logprobs (`Sampler.supports_batched_sampling`) are therefore sampled together: the same
temperature, top-k, top-p and min-p on all rows, and one copy of all tokens to the host. The random
numbers come from the requests' own samplers, so each draws what it would draw alone. Axis letters
as in sampler.py; R rows of logits, one per request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2vl.engine.kv_cache.storage import copy_to_device
from qwen2vl.engine.sampling.sampler import NonFiniteLogitsError, ResolvedSamplingParams, Sampler
from qwen2vl.errors import EngineError

__all__ = ["sample_batch"]


def sample_batch(samplers: Sequence[Sampler], logits_RV: Tensor) -> list[int | EngineError]:
    """Sample the next token of each request and update its sampler.

    Returns:
        One token or error per row; an error concerns its row only.
    """
    best_R, tokens_R = logits_RV.max(dim=1)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.params.is_greedy]
    if drawing:
        (rows_R,) = copy_to_device(logits_RV.device, torch.tensor(drawing))
        drawn_R = _draw(logits_RV[rows_R].float(), [samplers[row] for row in drawing])
        tokens_R = tokens_R.index_copy(0, rows_R, drawn_R)
    # The only synchronization of a step. float64 represents token ids exactly.
    tokens, bests = torch.stack((tokens_R.double(), best_R.double())).tolist()
    sampled: list[int | EngineError] = []
    for sampler, token, best in zip(samplers, tokens, bests, strict=True):
        if math.isfinite(best):
            sampler.accept_token(int(token))
            sampled.append(int(token))
        else:
            sampled.append(NonFiniteLogitsError.of(best))
    return sampled


def _draw(scores_RV: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Batched `top_k_top_p_filter` and draw; filtered tokens have a weight of zero."""
    batch_params = [sampler.params for sampler in samplers]
    scalars = [
        [params.temperature for params in batch_params],
        [1 - params.top_p for params in batch_params],
        [params.min_p for params in batch_params],
        [sampler.uniform() for sampler in samplers],
    ]
    (on_device,) = copy_to_device(
        scores_RV.device, torch.tensor(scalars, dtype=torch.float64)[:, :, None]
    )
    temperature_R1, tail_R1, min_p_R1, uniform_R1 = on_device
    scores_RV = _apply_top_k(scores_RV, batch_params)
    weights_RV = (scores_RV / temperature_R1.float()).softmax(dim=1)
    if any(params.top_p < 1.0 for params in batch_params):
        weights_RV = _zero_below(weights_RV, _top_p_threshold(weights_RV, tail_R1.float()))
    if any(params.min_p > 0.0 for params in batch_params):
        threshold_R1 = min_p_R1.float() * weights_RV.amax(dim=1, keepdim=True)
        weights_RV = _zero_below(weights_RV, threshold_R1)
    bounds_RV = weights_RV.cumsum(dim=1, dtype=torch.float64)
    return torch.searchsorted(bounds_RV, uniform_R1 * bounds_RV[:, -1:], right=True)[:, 0]


def _apply_top_k(scores_RV: Tensor, batch_params: Sequence[ResolvedSamplingParams]) -> Tensor:
    size = scores_RV.shape[1]
    top_k = [params.top_k if 0 < params.top_k < size else 0 for params in batch_params]
    if not any(top_k):
        return scores_RV
    best_RJ = scores_RV.topk(max(top_k), dim=1).values
    (top_k_R1,) = copy_to_device(scores_RV.device, torch.tensor(top_k)[:, None])
    threshold_R1 = best_RJ.gather(1, (top_k_R1 - 1).clamp(min=0))
    threshold_R1 = threshold_R1.masked_fill(top_k_R1 == 0, -math.inf)
    return scores_RV.masked_fill(scores_RV < threshold_R1, -math.inf)


def _top_p_threshold(weights_RV: Tensor, tail_R1: Tensor) -> Tensor:
    """Return the smallest weight kept by top-p; with a tail of 0, the smallest positive weight."""
    ascending_RV = weights_RV.sort(dim=1).values
    in_tail_RV = ascending_RV.cumsum(dim=1) <= tail_R1
    first_R1 = in_tail_RV.sum(dim=1, keepdim=True).clamp(max=weights_RV.shape[1] - 1)
    return ascending_RV.gather(1, first_R1)


def _zero_below(weights_RV: Tensor, threshold_R1: Tensor) -> Tensor:
    return weights_RV.masked_fill(weights_RV < threshold_R1, 0.0)
