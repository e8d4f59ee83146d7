"""Decode on a GPU: bytes of weights a second, over the bandwidth found in the same run.

    python benchmarks/gpu_decode.py [--shapes 2B 7B] [--context 1024] [--steps 200] [--compile]

A token needs every matrix of the decoder, and the head, once: those bytes over the time of a step
of the engine, one answer under way, are the rate. Bandwidth is the better of copying and of reading
a gigabyte and more. The official shapes are drawn on the device, so no folder is needed; words come
from nano's tokenizer. Recorded steps and the ordinary ones take turns. Prints one line for
results.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from record import line

from qwen2vl import LLM, EngineConfig, SamplingParams
from qwen2vl.compile.regions import compile_for_answers
from qwen2vl.config import PRESETS, Qwen2VLConfig
from qwen2vl.loading import load_processor
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.processor import Processor

INITIALIZER_RANGE = 0.02  # config.json's own
WARM_STEPS = 20


def bandwidth(device: torch.device, num_bytes: int, rounds: int = 20) -> dict[str, float]:
    """Copy and read so many bytes; gigabytes a second, the best of all rounds."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copies, reads = [], []
    for _ in range(rounds):
        copies.append(_seconds(device, lambda: target.copy_(source)))
        reads.append(_seconds(device, lambda: source.sum()))
    return {
        "copy_gb_s": round(2 * num_bytes / min(copies) / 1e9, 1),
        "read_gb_s": round(num_bytes / min(reads) / 1e9, 1),
    }


def _seconds(device: torch.device, work: Any) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_model(config: Qwen2VLConfig, device: torch.device) -> Qwen2VL:
    """Draw a model of this shape in bfloat16, on the device itself."""
    with torch.device("meta"):
        model = Qwen2VL(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, INITIALIZER_RANGE)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter += 1.0
    return model


def bytes_a_token(model: Qwen2VL) -> int:
    """Count what one token reads of the weights: all blocks and the head."""
    parts = [*model.model.layers.parameters(), *model.model.norm.parameters(), model.head_weight]
    return sum(part.numel() * part.element_size() for part in parts)


def of_nano(processor: Processor, shape: Qwen2VLConfig) -> Qwen2VLConfig:
    """Give a shape the special ids of nano, whose tokenizer feeds it."""
    names = ("bos", "eos", "vision_start", "vision_end", "image", "video")
    fields = [f"{name}_token_id" for name in names]
    return replace(shape, **{name: getattr(processor.config, name) for name in fields})


class Answer:
    """One answer under way, step by step."""

    def __init__(self, llm: LLM, context: int, steps: int) -> None:
        self.llm = llm
        params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
        made = llm.processor.from_text("a b c d e f g h " * context)
        ids = made.input_ids[:context]
        places_3T = made.position_ids_3T[:, : len(ids)]
        (sequence,) = llm.sequences(replace(made, input_ids=ids, position_ids_3T=places_3T), params)
        llm.scheduler.add(sequence)
        for _ in range(WARM_STEPS + context // llm.scheduler.limits.tokens):
            llm.step()

    def step_seconds(self) -> float:
        """Do one step, from the plan to the token on the host."""
        began = time.perf_counter()
        self.llm.step()
        return time.perf_counter() - began


def decode(
    model: Qwen2VL, processor: Processor, context: int, steps: int
) -> dict[str, dict[str, float]]:
    """Time steps with and without recording, by turns; milliseconds."""
    most = context + WARM_STEPS + steps + 64
    answers = {
        name: Answer(
            LLM.of(
                model,
                processor,
                engine=EngineConfig(cache_tokens=2 * most, graphs=name == "recorded"),
            ),
            context,
            steps + 2 * WARM_STEPS + 8,
        )
        for name in ("recorded", "ordinary")
    }
    found: dict[str, list[float]] = {name: [] for name in answers}
    for _ in range(steps):
        for name, answer in answers.items():
            found[name].append(answer.step_seconds())
    return {name: {"step_ms": round(1000 * median(times), 3)} for name, times in found.items()}


def measure(
    shape: Qwen2VLConfig,
    device: torch.device,
    context: int,
    steps: int,
    num_bytes: int,
    *,
    compiled: bool = False,
) -> dict[str, Any]:
    """Measure one shape, and the bandwidth before and after."""
    processor = load_processor("nano")
    before = bandwidth(device, num_bytes)
    model = random_model(of_nano(processor, shape), device)
    weights = bytes_a_token(model)
    if compiled and not compile_for_answers(model):
        raise SystemExit("nothing here can compile; see the warning")
    numbers = decode(model, processor, context, steps)
    after = bandwidth(device, num_bytes)
    best = {name: max(before[name], after[name]) for name in before}
    for timed in numbers.values():
        rate = weights / timed["step_ms"] / 1e6
        timed["weights_gb_s"] = round(rate, 1)
        timed["share"] = round(rate / max(best.values()), 3)
    return {"weights_gb": round(weights / 1e9, 3), **best, **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=list(PRESETS), default=["2B", "7B"])
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="copied to find the bandwidth")
    parser.add_argument("--compile", action="store_true", help="fuse what lies between products")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; benchmarks/engine.py measures a CPU")
    device, num_bytes = torch.device("cuda:0"), int(given.gigabytes * 1e9)
    print(
        line(
            {
                name: measure(
                    PRESETS[name],
                    device,
                    given.context,
                    given.steps,
                    num_bytes,
                    compiled=given.compile,
                )
                for name in given.shapes
            }
        )
    )


if __name__ == "__main__":
    main()
