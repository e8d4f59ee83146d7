"""The official 2B shape with random bf16 weights, compared with transformers: errors and seconds.

    python benchmarks/official_2b.py        # once: 4.4 GB on disk
    python benchmarks/parity_2b.py [--only errors | seconds]    # 12 GB of memory, 2 cores

Errors: over eight prompts of about 300 positions, an image between text, the distance of each bf16
model's logits from transformers in fp32. (Random weights have many near ties: over one prompt alone
the top-1 tokens of two equally good models differ by more than a point.) Seconds: the vision tower
on 448 x 448 pixels, the prefill of one prompt with the image already encoded, and one token of
decode over the KV cache; both libraries are interleaved, so that a busy machine slows both. Prints
one line for results.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import ROOT, format_result
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2VLForConditionalGeneration as Reference
from transformers.utils import logging

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.geometry import (
    AttnMeta,
    Grid,
    VisionMeta,
    mrope_positions,
    num_vision_tokens,
    placeholder_index,
)
from qwen2vl.loading import load_model
from qwen2vl.model import KVCache, Qwen2VL, SequenceKVCaches
from qwen2vl.model.vision import normalize_pixels
from qwen2vl.processor.image import patchify
from qwen2vl.weights import read_config, resolve_model

FOLDER = ROOT / "build" / "official_2b"

SIZE = (448, 448)
GRID = Grid(1, 32, 32)  # 256 vision tokens
NUM_PROMPTS = 8
NUM_TOKENS_BEFORE, NUM_TOKENS_AFTER = 16, 32  # text around the image and its two vision tokens
MAX_NEW_TOKENS = 256  # capacity of the KV cache beyond the prompt

MAX_ERROR_RATIO = 1.1  # of this library's logits error to that of transformers in bf16
MAX_TOP1_LOSS = 1.0  # percentage points below transformers in bf16


@dataclass(frozen=True)
class Prompt:
    """An image between two runs of random text tokens, in the inputs of both libraries."""

    ids: list[int]
    patches_NP: Tensor  # uint8
    pixel_values: Tensor  # the same, normalized
    position_ids_3T: Tensor
    rope_delta: int

    @classmethod
    def draw(cls, config: Qwen2VLConfig, seed: int = 0) -> Prompt:
        generator = torch.Generator().manual_seed(seed)
        text_ids = torch.randint(
            0, 100_000, (NUM_TOKENS_BEFORE + NUM_TOKENS_AFTER,), generator=generator
        ).tolist()
        image_ids = [
            config.vision_start_token_id,
            *[config.image_token_id] * num_vision_tokens(GRID),
            config.vision_end_token_id,
        ]
        ids = text_ids[:NUM_TOKENS_BEFORE] + image_ids + text_ids[NUM_TOKENS_BEFORE:]
        coarse = 255 * torch.rand(1, 3, 24, 24, generator=generator)
        frame_FCHW = F.interpolate(coarse, size=SIZE, mode="bicubic").clamp(0, 255).byte()
        patches_NP, _ = patchify(frame_FCHW, config.vision)
        return cls(
            ids,
            patches_NP,
            normalize_pixels(patches_NP, config.vision),
            *mrope_positions(ids, [GRID], config),
        )


class Qwen2VLRunner:
    """This library's model in bf16, with a new KV cache at each prefill."""

    def __init__(self, folder: Path, prompt: Prompt) -> None:
        self.config = read_config(folder)
        self.model: Qwen2VL = load_model(folder, self.config, dtype="bfloat16", max_model_len=1024)
        self.prompt = prompt

    def vision(self) -> None:
        self.vision_MD = self.model.encode(self.prompt.patches_NP, VisionMeta.build([GRID]))

    def hidden(self) -> Tensor:
        length = len(self.prompt.ids)
        capacity = length + MAX_NEW_TOKENS
        self.cache = KVCache.allocate(self.config.text, capacity, torch.bfloat16, "cpu")
        meta = AttnMeta.build([length])
        return self.model(
            torch.tensor(self.prompt.ids),
            self.prompt.position_ids_3T,
            meta,
            vision_MD=self.vision_MD,
            placeholder_index_M=placeholder_index(self.prompt.ids, self.config),
            caches=SequenceKVCaches([self.cache], meta),
        )

    def logits(self, prompt: Prompt) -> Tensor:
        self.prompt = prompt
        self.vision()
        return self.model.logits(self.hidden()).float()

    def prefill(self) -> None:
        self.next = int(self.model.logits(self.hidden()[-1:]).argmax())

    def decode(self) -> None:
        index = self.cache.length
        meta = AttnMeta.build([1], [index + 1])
        hidden_TD = self.model(
            torch.tensor([self.next]),
            torch.full((3, 1), index + self.prompt.rope_delta),
            meta,
            caches=SequenceKVCaches([self.cache], meta),
        )
        self.next = int(self.model.logits(hidden_TD).argmax())


class TransformersRunner:
    """transformers with its default attention (sdpa) and DynamicCache."""

    def __init__(self, folder: Path, prompt: Prompt, dtype: torch.dtype) -> None:
        self.model: Any = Reference.from_pretrained(folder, dtype=dtype).eval()
        self.prompt = prompt

    def vision(self) -> None:
        grid_thw = torch.tensor([GRID])
        self.encoded = self.model.model.get_image_features(self.prompt.pixel_values, grid_thw)

    def run(self, ids: list[int], positions: Tensor, past: Any, **options: Any) -> Any:
        return self.model(
            input_ids=torch.tensor([ids]),
            position_ids=positions[:, None],
            past_key_values=past,
            use_cache=True,
            **options,
        )

    def logits(self, prompt: Prompt) -> Tensor:
        self.prompt = prompt
        self.vision()
        encoded = {"image": self.encoded}
        out = self.run(
            self.prompt.ids, self.prompt.position_ids_3T, None, mm_encoder_outputs=encoded
        )
        return out.logits[0].float()

    def prefill(self) -> None:
        out = self.run(
            self.prompt.ids,
            self.prompt.position_ids_3T,
            None,
            mm_encoder_outputs={"image": self.encoded},
            logits_to_keep=1,
        )
        self.past, self.next = out.past_key_values, int(out.logits[0, -1].argmax())

    def decode(self) -> None:
        position = self.past.get_seq_length() + self.prompt.rope_delta
        out = self.run([self.next], torch.full((3, 1), position), self.past)
        self.next = int(out.logits[0, -1].argmax())


def distance(
    runner: Qwen2VLRunner | TransformersRunner, prompts: list[Prompt], exact: list[Tensor]
) -> dict[str, float]:
    """Measure the relative error (of norms) and the share of equal top-1 tokens."""
    squares = exact_squares = agree = count = 0.0
    for prompt, exact_TV in zip(prompts, exact, strict=True):
        logits_TV = runner.logits(prompt)
        agree += (logits_TV.argmax(-1) == exact_TV.argmax(-1)).sum().item()
        count += len(logits_TV)
        squares += (logits_TV - exact_TV).square_().sum().item()
        exact_squares += exact_TV.square().sum().item()
    return {
        "relative_error": round((squares / exact_squares) ** 0.5, 6),
        "top1_percent": round(100 * agree / count, 2),
    }


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_interleaved(
    ours: Qwen2VLRunner, theirs: TransformersRunner, phase: str, rounds: int
) -> dict[str, float]:
    """Time a phase of both, interleaved in alternating order; medians in milliseconds."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    runners = [("ours", ours), ("theirs", theirs)]
    for _, runner in runners:
        getattr(runner, phase)()  # warm-up: pages, kernels, caches
    for _ in range(rounds):
        runners.reverse()
        for name, runner in runners:
            times[name].append(seconds(getattr(runner, phase)))
    ours_s, theirs_s = median(times["ours"]), median(times["theirs"])
    return {
        "ours_ms": round(1000 * ours_s, 1),
        "theirs_ms": round(1000 * theirs_s, 1),
        "ratio": round(ours_s / theirs_s, 3),
    }


@torch.inference_mode()
def measure_errors(folder: Path) -> dict[str, Any]:
    """Compute the reference logits in fp32, free that model, then run both in bf16."""
    prompts = [Prompt.draw(read_config(folder), seed) for seed in range(NUM_PROMPTS)]
    reference = TransformersRunner(folder, prompts[0], torch.float32)
    exact = [reference.logits(prompt) for prompt in prompts]
    del reference
    own = distance(Qwen2VLRunner(folder, prompts[0]), prompts, exact)
    other = distance(TransformersRunner(folder, prompts[0], torch.bfloat16), prompts, exact)
    return {
        "positions": sum(len(prompt.ids) for prompt in prompts),
        "ours": own,
        "theirs": other,
        "error_ratio": round(own["relative_error"] / other["relative_error"], 3),
    }


@torch.inference_mode()
def measure_seconds(folder: Path, rounds: int) -> dict[str, Any]:
    """Time both in bf16, phase by phase."""
    prompt = Prompt.draw(read_config(folder))
    ours, theirs = Qwen2VLRunner(folder, prompt), TransformersRunner(folder, prompt, torch.bfloat16)
    return {
        "vision": time_interleaved(ours, theirs, "vision", rounds),
        "prefill": time_interleaved(ours, theirs, "prefill", rounds),
        "decode": time_interleaved(ours, theirs, "decode", 32),
    }


def find_violations(numbers: dict[str, Any]) -> list[str]:
    """Return the names of the limits that are violated."""
    violations = [
        p for p in ("vision", "prefill", "decode") if p in numbers and numbers[p]["ratio"] > 1
    ]
    if "error_ratio" in numbers:
        if numbers["error_ratio"] > MAX_ERROR_RATIO:
            violations.append("error_ratio")
        if numbers["ours"]["top1_percent"] < numbers["theirs"]["top1_percent"] - MAX_TOP1_LOSS:
            violations.append("top1_percent")
    return violations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--only", choices=["errors", "seconds"], help="run one of the two parts")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = resolve_model(args.model)
    numbers: dict[str, Any] = {}
    if args.only != "seconds":
        numbers |= measure_errors(folder)
    if args.only != "errors":
        numbers |= measure_seconds(folder, args.rounds)
    print(format_result(numbers))
    if violations := find_violations(numbers):
        print("does not hold: " + ", ".join(violations), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
