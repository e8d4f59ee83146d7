"""The tokens of many answers at once, on the device where their scores are.

On a GPU every look at a score waits for all that was asked before, so samplers that need nothing
special (sampler.py: `is_plain`) do not look one by one: the same rules run on all rows together,
and one copy brings every token to the host. The numbers that decide draws come from the samplers
and are sent along, so an answer's draws are those that it would have had alone. Letters as in
sampler.py; R rows, J the best few scores. Back up: runner.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2vl.engine.host_to_device import send
from qwen2vl.engine.sampling.sampler import Rule, Sampler, not_finite
from qwen2vl.errors import EngineError

__all__ = ["choose"]


def choose(samplers: Sequence[Sampler], logits_RV: Tensor) -> list[int | EngineError]:
    """Choose the next id of each plain sampler, which accepts it; errors come in their places."""
    best_R, tokens_R = logits_RV.max(dim=1)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.rule.is_greedy]
    if drawing:
        (rows_R,) = send(logits_RV.device, torch.tensor(drawing))
        drawn_R = _draw(logits_RV[rows_R].float(), [samplers[row] for row in drawing])
        tokens_R = tokens_R.index_copy(0, rows_R, drawn_R)
    # The only wait of a step. In float64 ids are exact.
    tokens, bests = torch.stack((tokens_R.double(), best_R.double())).tolist()
    chosen: list[int | EngineError] = []
    for sampler, token, best in zip(samplers, tokens, bests, strict=True):
        if math.isfinite(best):
            sampler.accept(int(token))
            chosen.append(int(token))
        else:
            chosen.append(not_finite(best))
    return chosen


def _draw(scores_RV: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Do what `shortlist` and the draw do; what the first leaves out has a weight of zero."""
    rules = [sampler.rule for sampler in samplers]
    numbers = [
        [rule.temperature for rule in rules],
        [1 - rule.top_p for rule in rules],
        [rule.min_p for rule in rules],
        [sampler.uniform() for sampler in samplers],
    ]
    (sent,) = send(scores_RV.device, torch.tensor(numbers, dtype=torch.float64)[:, :, None])
    temperature_R1, tail_R1, min_p_R1, uniform_R1 = sent
    scores_RV = _within_top_k(scores_RV, rules)
    weights_RV = (scores_RV / temperature_R1.float()).softmax(dim=1)
    if any(rule.top_p < 1.0 for rule in rules):
        weights_RV = _at_least(weights_RV, _least_in_top_p(weights_RV, tail_R1.float()))
    if any(rule.min_p > 0.0 for rule in rules):
        least_R1 = min_p_R1.float() * weights_RV.amax(dim=1, keepdim=True)
        weights_RV = _at_least(weights_RV, least_R1)
    bounds_RV = weights_RV.cumsum(dim=1, dtype=torch.float64)
    return torch.searchsorted(bounds_RV, uniform_R1 * bounds_RV[:, -1:], right=True)[:, 0]


def _within_top_k(scores_RV: Tensor, rules: Sequence[Rule]) -> Tensor:
    size = scores_RV.shape[1]
    kept = [rule.top_k if 0 < rule.top_k < size else 0 for rule in rules]
    if not any(kept):
        return scores_RV
    best_RJ = scores_RV.topk(max(kept), dim=1).values
    (kept_R1,) = send(scores_RV.device, torch.tensor(kept)[:, None])
    edge_R1 = best_RJ.gather(1, (kept_R1 - 1).clamp(min=0))
    edge_R1 = edge_R1.masked_fill(kept_R1 == 0, -math.inf)
    return scores_RV.masked_fill(scores_RV < edge_R1, -math.inf)


def _least_in_top_p(weights_RV: Tensor, tail_R1: Tensor) -> Tensor:
    """Find the least weight above the unlikely tail; with a tail of 0, the least that is any."""
    ascending_RV = weights_RV.sort(dim=1).values
    in_tail_RV = ascending_RV.cumsum(dim=1) <= tail_R1
    first_R1 = in_tail_RV.sum(dim=1, keepdim=True).clamp(max=weights_RV.shape[1] - 1)
    return ascending_RV.gather(1, first_R1)


def _at_least(weights_RV: Tensor, least_R1: Tensor) -> Tensor:
    return weights_RV.masked_fill(weights_RV < least_R1, 0.0)
