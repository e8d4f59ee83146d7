"""Batched sampling on a GPU: equal tokens to those of a CPU, with one synchronization."""

from __future__ import annotations

import warnings

import torch

from qwen2vl.engine.sampling.batched import sample_batch
from qwen2vl.engine.sampling.sampler import ResolvedSamplingParams, Sampler
from tests.gpu.device import GPU, needs_gpu

pytestmark = needs_gpu

PARAMS = [
    ResolvedSamplingParams(temperature=0.0, top_k=0, top_p=1.0),
    ResolvedSamplingParams(temperature=0.7, top_k=50, top_p=0.9),
    ResolvedSamplingParams(temperature=1.0, top_k=0, top_p=1.0),
    ResolvedSamplingParams(temperature=2.0, top_k=0, top_p=0.5, min_p=0.05),
    ResolvedSamplingParams(temperature=1.0, top_k=1, top_p=0.001),
]
VOCAB_SIZE = 151_936


def samplers() -> list[Sampler]:
    cpu = torch.device("cpu")
    return [
        Sampler(params, [], vocab_size=VOCAB_SIZE, device=cpu, seed=seed)
        for seed, params in enumerate(PARAMS)
    ]


def test_sampling_on_gpu_and_cpu_is_equal() -> None:
    """Up to rounding at the boundary between two tokens, one draw in thousands."""
    generator = torch.Generator().manual_seed(0)
    cpu_samplers, gpu_samplers = samplers(), samplers()
    num_equal = 0
    for _ in range(10):
        logits_RV = 4 * torch.randn(len(PARAMS), VOCAB_SIZE, generator=generator)
        expected, got = (
            sample_batch(cpu_samplers, logits_RV),
            sample_batch(gpu_samplers, logits_RV.to(GPU)),
        )
        assert got[0] == expected[0] and got[-1] == expected[-1]
        num_equal += sum(
            got_token == expected_token
            for got_token, expected_token in zip(got, expected, strict=True)
        )
    assert num_equal >= 10 * len(PARAMS) - 1


def test_batched_sampling_synchronizes_once() -> None:
    logits_RV = torch.randn(len(PARAMS), VOCAB_SIZE, device=GPU)
    batch = samplers()
    sample_batch(batch, logits_RV)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample_batch(batch, logits_RV)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1
