"""The engine beside itself: eight requests against one, a second question, guesses, its own cost.

    python benchmarks/official_2b.py                       # once: 4.4 GB on disk
    python benchmarks/engine.py [--only batch | second | overhead | drafts]

batch: tokens a second of eight requests together over one alone. second: time to the first token
of another question on the same picture, over one decode step. overhead: what a step of eight costs
beside the model's own arithmetic. drafts: tokens a second with guesses over without, where pages
are read again and where nothing repeats, question by question. The first two take the 2B shape in
bf16, overhead that and nano, drafts nano; both sides of each ratio take turns in one run. Prints
one line for results.md.
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
from record import ROOT, line

from qwen2vl import LLM, EngineConfig, SamplingParams
from qwen2vl.synth import Mixture, render, sample

FOLDER = ROOT / "build" / "official_2b"
NUM_TOKENS = 16  # of each answer in `batch`


def question(seed: int, words: str) -> list[dict[str, Any]]:
    """Ask about a random picture of 448 x 448."""
    pixels = np.random.default_rng(seed).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    content = [{"type": "image", "image": pixels}, {"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


def decode_rate(llm: LLM, conversations: list[list[dict[str, Any]]]) -> float:
    """Tokens a second between the first tokens and the last, of all answers together."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    answers = llm.chat(conversations, params)
    # Prompts are in the cache (`batch` asks twice), so that all decode side by side.
    slowest = max(answer.seconds.decode for answer in answers)
    return sum(len(answer.token_ids) - 1 for answer in answers) / slowest


def batch(folder: Path, rounds: int) -> dict[str, Any]:
    llm = LLM(folder, dtype="bfloat16", max_model_len=1024)
    conversations = [question(seed, f"Question {seed}?") for seed in range(8)]
    llm.chat(conversations, SamplingParams(max_tokens=1))
    rates: dict[int, list[float]] = {1: [], 8: []}
    for _ in range(rounds):
        for count, found in rates.items():
            found.append(decode_rate(llm, conversations[:count]))
    one, eight = median(rates[1]), median(rates[8])
    return {
        "one_per_s": round(one, 2),
        "eight_per_s": round(eight, 2),
        "ratio": round(eight / one, 2),
    }


def second(folder: Path, rounds: int) -> dict[str, Any]:
    llm = LLM(folder, dtype="bfloat16", max_model_len=1024)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm.chat(question(0, "What is this?"), params)
    firsts: list[float] = []
    steps: list[float] = []
    for turn in range(rounds):
        (answer,) = llm.chat(question(0, f"And what is number {turn}?"), params)
        firsts.append(answer.seconds.vision + answer.seconds.prefill)
        steps.append(answer.seconds.decode / 7)
    first, step = median(firsts), median(steps)
    return {
        "first_ms": round(1000 * first, 1),
        "step_ms": round(1000 * step, 1),
        "ratio": round(first / step, 2),
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
    }


def overheads(folder: Path, rounds: int) -> dict[str, Any]:
    return {
        "nano": overhead(LLM("nano", dtype="float32"), 20 * rounds),
        "2B": overhead(LLM(folder, dtype="bfloat16", max_model_len=1024), 4 * rounds),
    }


def overhead(llm: LLM, rounds: int) -> dict[str, float]:
    """Time steps of eight decoding sequences, and the model's forward and logits inside them."""
    inside = 0.0

    def timed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal inside
            began = time.perf_counter()
            out = function(*args, **kwargs)
            inside += time.perf_counter() - began
            return out

        return call

    llm.model.forward = timed(llm.model.forward)  # type: ignore[method-assign]
    llm.model.logits = timed(llm.model.logits)  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, max_tokens=rounds + 20, ignore_eos=True)
    prompts = [
        llm.processor([{"role": "user", "content": f"{n} times, repeat this"}]) for n in range(8)
    ]
    for prompt in prompts:
        (sequence,) = llm.sequences(prompt, params)
        llm.scheduler.add(sequence)
    for _ in range(10):
        llm.step()
    costs: list[float] = []
    wholes: list[float] = []
    for _ in range(rounds):
        inside, began = 0.0, time.perf_counter()
        llm.step()
        whole = time.perf_counter() - began
        wholes.append(whole)
        costs.append(whole - inside)
    return {
        "step_ms": round(1000 * median(wholes), 3),
        "overhead_ms": round(1000 * median(costs), 3),
        "percent": round(100 * median(costs) / median(wholes), 2),
    }


def drafts(rounds: int) -> dict[str, Any]:
    """Read pages twice (the second time is timed), and random tokens that repeat nothing."""
    mixture = Mixture(weights={"text": 1.0}, page_share=1.0, page_lines=(3, 4))
    pages = [render(sample(7, index, mixture)).prompt for index in range(12)]
    plain, guessing = (
        LLM("nano", dtype="float32", engine=EngineConfig(num_drafts=n)) for n in (0, 8)
    )
    reading = SamplingParams(temperature=0, max_tokens=120)
    wandering = SamplingParams(temperature=5.0, top_k=0, max_tokens=120, ignore_eos=True)
    for llm in (plain, guessing):
        for page in pages:
            llm.chat(page, reading)
    numbers: dict[str, Any] = {}
    for name, params in (("read_again", reading), ("nothing_repeats", wandering)):
        ratios: list[float] = []
        for turn in range(rounds):
            for page in pages:
                order = (plain, guessing) if turn % 2 else (guessing, plain)
                said = {llm: llm.chat(page, replace(params, seed=turn))[0] for llm in order}
                slow, fast = said[plain], said[guessing]
                if slow.token_ids != fast.token_ids:
                    raise SystemExit("guesses changed an answer")
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
    print(line({name: runs[name]() for name in chosen}))


if __name__ == "__main__":
    main()
