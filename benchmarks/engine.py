"""Engine benchmark: batching, prefix caching, scheduling overhead and speculative decoding.

    python benchmarks/official_2b.py                       # once: 4.4 GB on disk
    python benchmarks/engine.py [--only batch | second | overhead | drafts]

batch: decode throughput of eight concurrent requests over that of one. second: time to first token
of a second question on the same image, over one decode step. overhead: the engine's share of a step
of eight requests, beside the model's own computation. drafts: decode throughput with n-gram
speculative decoding over without, for pages that are read again and for output without repetition,
request by request. The first two use the 2B shape in bf16, overhead that and nano, drafts nano; the
two sides of each ratio alternate in one run. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from record import ROOT, format_result

from qwen2vl import LLM, EngineConfig, SamplingParams
from qwen2vl.synth import Mixture, render, sample

FOLDER = ROOT / "build" / "official_2b"
NUM_TOKENS = 16  # of each output in `batch`


def image_question(seed: int, text: str) -> list[dict[str, Any]]:
    """Build a conversation about a random image of 448 x 448."""
    pixels = np.random.default_rng(seed).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    content = [{"type": "image", "image": pixels}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def decode_rate(llm: LLM, conversations: list[list[dict[str, Any]]]) -> float:
    """Return tokens per second between the first tokens and the last, of all requests together."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    completions = llm.chat(conversations, params)
    # Prompts are in the prefix cache (`batch` runs them twice), so that all decode concurrently.
    slowest = max(completion.seconds.decode for completion in completions)
    return sum(len(completion.token_ids) - 1 for completion in completions) / slowest


def batch(folder: Path, rounds: int) -> dict[str, Any]:
    llm = LLM(folder, dtype="bfloat16", max_model_len=1024)
    conversations = [image_question(seed, f"Question {seed}?") for seed in range(8)]
    llm.chat(conversations, SamplingParams(max_tokens=1))
    rates: dict[int, list[float]] = {1: [], 8: []}
    for _ in range(rounds):
        for count, values in rates.items():
            values.append(decode_rate(llm, conversations[:count]))
    one, eight = median(rates[1]), median(rates[8])
    return {
        "one_per_s": round(one, 2),
        "eight_per_s": round(eight, 2),
        "ratio": round(eight / one, 2),
    }


def second(folder: Path, rounds: int) -> dict[str, Any]:
    llm = LLM(folder, dtype="bfloat16", max_model_len=1024)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm.chat(image_question(0, "What is this?"), params)
    firsts: list[float] = []
    steps: list[float] = []
    for turn in range(rounds):
        (completion,) = llm.chat(image_question(0, f"And what is number {turn}?"), params)
        firsts.append(completion.seconds.vision + completion.seconds.prefill)
        steps.append(completion.seconds.decode / 7)
    first, step = median(firsts), median(steps)
    return {
        "first_ms": round(1000 * first, 1),
        "step_ms": round(1000 * step, 1),
        "ratio": round(first / step, 2),
        "prompt_tokens": completion.prompt_tokens,
        "cached_tokens": completion.cached_tokens,
    }


def overheads(folder: Path, rounds: int) -> dict[str, Any]:
    return {
        "nano": overhead(LLM("nano", dtype="float32"), 20 * rounds),
        "2B": overhead(LLM(folder, dtype="bfloat16", max_model_len=1024), 4 * rounds),
    }


def overhead(llm: LLM, rounds: int) -> dict[str, float]:
    """Time decode steps of eight requests, and the model's forward and logits within them."""
    model_seconds = 0.0

    def timed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal model_seconds
            start = time.perf_counter()
            out = function(*args, **kwargs)
            model_seconds += time.perf_counter() - start
            return out

        return call

    llm.model.forward = timed(llm.model.forward)  # type: ignore[method-assign]
    llm.model.logits = timed(llm.model.logits)  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, max_tokens=rounds + 20, ignore_eos=True)
    prompts = [
        llm.processor([{"role": "user", "content": f"{n} times, repeat this"}]) for n in range(8)
    ]
    for prompt in prompts:
        (request,) = llm.create_requests(prompt, params)
        llm.engine_core.scheduler.add_request(request)
    for _ in range(10):
        llm.step()
    overhead_seconds: list[float] = []
    step_seconds: list[float] = []
    for _ in range(rounds):
        model_seconds, start = 0.0, time.perf_counter()
        llm.step()
        seconds = time.perf_counter() - start
        step_seconds.append(seconds)
        overhead_seconds.append(seconds - model_seconds)
    return {
        "step_ms": round(1000 * median(step_seconds), 3),
        "overhead_ms": round(1000 * median(overhead_seconds), 3),
        "percent": round(100 * median(overhead_seconds) / median(step_seconds), 2),
    }


def drafts(rounds: int) -> dict[str, Any]:
    """Time reading pages a second time, and random outputs without repetition."""
    mixture = Mixture(weights={"text": 1.0}, page_share=1.0, page_lines=(3, 4))
    pages = [render(sample(7, index, mixture)).prompt for index in range(12)]
    plain, speculative = (
        LLM("nano", dtype="float32", engine=EngineConfig(num_speculative_tokens=n)) for n in (0, 8)
    )
    reading = SamplingParams(temperature=0, max_tokens=120)
    without_repetition = SamplingParams(temperature=5.0, top_k=0, max_tokens=120, ignore_eos=True)
    for llm in (plain, speculative):
        for page in pages:
            llm.chat(page, reading)
    numbers: dict[str, Any] = {}
    for name, params in (("read_again", reading), ("nothing_repeats", without_repetition)):
        ratios: list[float] = []
        for turn in range(rounds):
            for page in pages:
                order = (plain, speculative) if turn % 2 else (speculative, plain)
                completions = {llm: llm.chat(page, replace(params, seed=turn))[0] for llm in order}
                slow, fast = completions[plain], completions[speculative]
                if slow.token_ids != fast.token_ids:
                    raise SystemExit("draft tokens changed the output")
                ratios.append(slow.seconds.decode / fast.seconds.decode)
        numbers[name] = {
            "ratio": round(median(ratios), 3),
            "quartiles": [round(q, 3) for q in quantiles(ratios, n=4)[::2]],
            "pairs": len(ratios),
        }
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--only", choices=["batch", "second", "overhead", "drafts"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "batch": lambda: batch(given.model, given.rounds),
        "second": lambda: second(given.model, given.rounds),
        "overhead": lambda: overheads(given.model, given.rounds),
        "drafts": lambda: drafts(given.rounds),
    }
    chosen = [given.only] if given.only else list(runs)
    print(format_result({name: runs[name]() for name in chosen}))


if __name__ == "__main__":
    main()
