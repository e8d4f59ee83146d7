"""Official 2B shape, random bf16 weights: our bf16 beside transformers' bf16, errors and seconds.

    python benchmarks/official_2b.py        # once: 4.4 GB on disk
    python benchmarks/parity_2b.py [--only errors | seconds]    # 12 GB of memory, 2 cores

Errors: over eight prompts of about 300 positions, a picture between words, the distance of each
bf16 model's logits from transformers in fp32. (Random weights have many near ties: over one prompt
alone the first choices of two equally good models differ by more than a point.) Seconds: the tower
on 448 x 448 pixels, the prefill of one prompt with the picture already encoded, and one token of
decode over the cache; ours and theirs take turns, so that a busy machine slows both. Prints one
line for results.md.
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
from record import ROOT, line
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2VLForConditionalGeneration as Reference
from transformers.utils import logging

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta, num_tokens, pad_index, text_positions
from qwen2vl.loading import load_model
from qwen2vl.model import KVCache, Qwen2VL
from qwen2vl.model.vision import normalize_pixels
from qwen2vl.processor.image import patchify
from qwen2vl.weights import find, read_config

FOLDER = ROOT / "build" / "official_2b"

SIZE = (448, 448)
GRID = Grid(1, 32, 32)  # 256 vision tokens
NUM_PROMPTS = 8
NUM_BEFORE, NUM_AFTER = 16, 32  # tokens of text around the picture and its two marks
MAX_NEW = 256  # room in the cache

MAX_ERROR_RATIO = 1.1  # of our logits' error to that of transformers' own bf16
MAX_TOP1_LOSS = 1.0  # points below transformers' own bf16


@dataclass(frozen=True)
class Prompt:
    """One picture between two runs of random words, for both sides."""

    ids: list[int]
    patches_NP: Tensor  # uint8
    pixel_values: Tensor  # the same, normalized
    position_ids_3T: Tensor
    rope_delta: int

    @classmethod
    def draw(cls, config: Qwen2VLConfig, seed: int = 0) -> Prompt:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(0, 100_000, (NUM_BEFORE + NUM_AFTER,), generator=generator).tolist()
        picture = [
            config.vision_start_token_id,
            *[config.image_token_id] * num_tokens(GRID),
            config.vision_end_token_id,
        ]
        ids = words[:NUM_BEFORE] + picture + words[NUM_BEFORE:]
        coarse = 255 * torch.rand(1, 3, 24, 24, generator=generator)
        frame_FCHW = F.interpolate(coarse, size=SIZE, mode="bicubic").clamp(0, 255).byte()
        patches_NP, _ = patchify(frame_FCHW, config.vision)
        return cls(
            ids,
            patches_NP,
            normalize_pixels(patches_NP, config.vision),
            *text_positions(ids, [GRID], config),
        )


class Ours:
    """Our model in bf16, with a cache that is filled anew by each prefill."""

    def __init__(self, folder: Path, prompt: Prompt) -> None:
        self.config = read_config(folder)
        self.model: Qwen2VL = load_model(folder, self.config, dtype="bfloat16", max_model_len=1024)
        self.prompt = prompt

    def vision(self) -> None:
        self.vision_MD = self.model.encode(self.prompt.patches_NP, VisionMeta.build([GRID]))

    def hidden(self) -> Tensor:
        length = len(self.prompt.ids)
        capacity = length + MAX_NEW
        self.cache = KVCache.allocate(self.config.text, capacity, torch.bfloat16, "cpu")
        return self.model(
            torch.tensor(self.prompt.ids),
            self.prompt.position_ids_3T,
            AttnMeta.build([length]),
            vision_MD=self.vision_MD,
            pad_index_M=pad_index(self.prompt.ids, self.config),
            caches=[self.cache],
        )

    def logits(self, prompt: Prompt) -> Tensor:
        self.prompt = prompt
        self.vision()
        return self.model.logits(self.hidden()).float()

    def prefill(self) -> None:
        self.next = int(self.model.logits(self.hidden()[-1:]).argmax())

    def decode(self) -> None:
        index = self.cache.length
        hidden_TD = self.model(
            torch.tensor([self.next]),
            torch.full((3, 1), index + self.prompt.rope_delta),
            AttnMeta.build([1], [index + 1]),
            caches=[self.cache],
        )
        self.next = int(self.model.logits(hidden_TD).argmax())


class Theirs:
    """transformers with its default attention (sdpa) and its own dynamic cache."""

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


def distance(bench: Ours | Theirs, prompts: list[Prompt], exact: list[Tensor]) -> dict[str, float]:
    """Measure the relative error (of norms) and how often the first choice is the same."""
    squares = exact_squares = agree = count = 0.0
    for prompt, exact_TV in zip(prompts, exact, strict=True):
        logits_TV = bench.logits(prompt)
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


def race(ours: Ours, theirs: Theirs, phase: str, rounds: int) -> dict[str, float]:
    """Time a phase of both in turns, changing who goes first; medians in milliseconds."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    runners = [("ours", ours), ("theirs", theirs)]
    for _, runner in runners:
        getattr(runner, phase)()  # warm: pages, kernels, caches
    for _ in range(rounds):
        runners.reverse()
        for name, runner in runners:
            times[name].append(seconds(getattr(runner, phase)))
    mine, other = median(times["ours"]), median(times["theirs"])
    return {
        "ours_ms": round(1000 * mine, 1),
        "theirs_ms": round(1000 * other, 1),
        "ratio": round(mine / other, 3),
    }


@torch.inference_mode()
def errors(folder: Path) -> dict[str, Any]:
    """Run fp32 first and drop it, then both in bf16."""
    prompts = [Prompt.draw(read_config(folder), seed) for seed in range(NUM_PROMPTS)]
    reference = Theirs(folder, prompts[0], torch.float32)
    exact = [reference.logits(prompt) for prompt in prompts]
    del reference
    own = distance(Ours(folder, prompts[0]), prompts, exact)
    other = distance(Theirs(folder, prompts[0], torch.bfloat16), prompts, exact)
    return {
        "positions": sum(len(prompt.ids) for prompt in prompts),
        "ours": own,
        "theirs": other,
        "error_ratio": round(own["relative_error"] / other["relative_error"], 3),
    }


@torch.inference_mode()
def speeds(folder: Path, rounds: int) -> dict[str, Any]:
    """Time both in bf16, phase by phase."""
    prompt = Prompt.draw(read_config(folder))
    ours, theirs = Ours(folder, prompt), Theirs(folder, prompt, torch.bfloat16)
    return {
        "vision": race(ours, theirs, "vision", rounds),
        "prefill": race(ours, theirs, "prefill", rounds),
        "decode": race(ours, theirs, "decode", 32),
    }


def verdict(numbers: dict[str, Any]) -> list[str]:
    """List what does not hold."""
    broken = [
        p for p in ("vision", "prefill", "decode") if p in numbers and numbers[p]["ratio"] > 1
    ]
    if "error_ratio" in numbers:
        if numbers["error_ratio"] > MAX_ERROR_RATIO:
            broken.append("error_ratio")
        if numbers["ours"]["top1_percent"] < numbers["theirs"]["top1_percent"] - MAX_TOP1_LOSS:
            broken.append("top1_percent")
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--only", choices=["errors", "seconds"], help="half of it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = find(given.model)
    numbers: dict[str, Any] = {}
    if given.only != "seconds":
        numbers |= errors(folder)
    if given.only != "errors":
        numbers |= speeds(folder, given.rounds)
    print(line(numbers))
    if broken := verdict(numbers):
        print("does not hold: " + ", ".join(broken), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
