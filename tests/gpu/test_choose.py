"""Tokens chosen on a GPU are those that a CPU chooses from the same scores and draws."""

from __future__ import annotations

import warnings

import torch

from qwen2vl.engine.sampling.batched import choose
from qwen2vl.engine.sampling.sampler import Rule, Sampler
from tests.gpu.device import GPU, needs_gpu

pytestmark = needs_gpu

RULES = [
    Rule(temperature=0.0, top_k=0, top_p=1.0),
    Rule(temperature=0.7, top_k=50, top_p=0.9),
    Rule(temperature=1.0, top_k=0, top_p=1.0),
    Rule(temperature=2.0, top_k=0, top_p=0.5, min_p=0.05),
    Rule(temperature=1.0, top_k=1, top_p=0.001),
]
VOCABULARY = 151_936


def samplers() -> list[Sampler]:
    cpu = torch.device("cpu")
    return [
        Sampler(rule, [], vocab_size=VOCABULARY, device=cpu, seed=seed)
        for seed, rule in enumerate(RULES)
    ]


def test_a_gpu_chooses_what_a_cpu_chooses() -> None:
    """All but a draw that rounding puts on the other side of a border, one in thousands."""
    generator = torch.Generator().manual_seed(0)
    here, there = samplers(), samplers()
    same = 0
    for _ in range(10):
        logits_RV = 4 * torch.randn(len(RULES), VOCABULARY, generator=generator)
        want, got = choose(here, logits_RV), choose(there, logits_RV.to(GPU))
        assert got[0] == want[0] and got[-1] == want[-1]
        same += sum(one == other for one, other in zip(got, want, strict=True))
    assert same >= 10 * len(RULES) - 1


def test_choosing_waits_once() -> None:
    logits_RV = torch.randn(len(RULES), VOCABULARY, device=GPU)
    chosen = samplers()
    choose(chosen, logits_RV)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            choose(chosen, logits_RV)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1
