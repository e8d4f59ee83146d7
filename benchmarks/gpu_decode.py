"""Decode on a GPU: the rate at which weights are read, over the memory bandwidth of the same run.

    python benchmarks/gpu_decode.py [--shapes 2B 7B] [--context 1024] [--steps 200] [--compile]

A token needs every matrix of the decoder, and the head, once: those bytes over the time of an
engine step with one running request are the rate. The bandwidth is the better of copying and of
reading a gigabyte and more. Weights of the official shapes are drawn on the device, so no folder is
needed; the tokenizer is nano's. Steps with and without CUDA graphs are interleaved. Prints one line
for results.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from record import format_result

from qwen2vl import LLM, EngineConfig, SamplingParams
from qwen2vl.compile.regions import compile_for_inference
from qwen2vl.config import PRESETS, Qwen2VLConfig
from qwen2vl.loading import load_processor
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.processor import Processor

INITIALIZER_RANGE = 0.02  # config.json's own
NUM_WARMUP_STEPS = 20


def bandwidth(device: torch.device, num_bytes: int, rounds: int = 20) -> dict[str, float]:
    """Measure the bandwidth of copying and reading, in gigabytes a second; best of all rounds."""
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


def _seconds(device: torch.device, function: Any) -> float:
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_model(config: Qwen2VLConfig, device: torch.device) -> Qwen2VL:
    """Build a model of this shape with random bfloat16 weights, on the device."""
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


def weight_bytes_per_token(model: Qwen2VL) -> int:
    """Return the bytes of weights that one token reads: all decoder blocks and the head."""
    parts = [*model.model.layers.parameters(), *model.model.norm.parameters(), model.lm_head_weight]
    return sum(part.numel() * part.element_size() for part in parts)


def with_nano_token_ids(processor: Processor, shape: Qwen2VLConfig) -> Qwen2VLConfig:
    """Return the config with the special token ids of nano, whose tokenizer is used."""
    names = ("bos", "eos", "vision_start", "vision_end", "image", "video")
    fields = [f"{name}_token_id" for name in names]
    return replace(shape, **{name: getattr(processor.config, name) for name in fields})


class RunningRequest:
    """An engine with one running request, to be stepped."""

    def __init__(self, llm: LLM, context: int, steps: int) -> None:
        self.llm = llm
        params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
        model_input = llm.processor.from_text("a b c d e f g h " * context)
        ids = model_input.input_ids[:context]
        positions_3T = model_input.position_ids_3T[:, : len(ids)]
        (request,) = llm.create_requests(
            replace(model_input, input_ids=ids, position_ids_3T=positions_3T), params
        )
        llm.engine_core.scheduler.add_request(request)
        for _ in range(
            NUM_WARMUP_STEPS + context // llm.engine_core.scheduler.limits.max_num_batched_tokens
        ):
            llm.step()

    def step_seconds(self) -> float:
        """Run one engine step, from scheduling to the token on the host; return its seconds."""
        start = time.perf_counter()
        self.llm.step()
        return time.perf_counter() - start


def decode(
    model: Qwen2VL, processor: Processor, context: int, steps: int
) -> dict[str, dict[str, float]]:
    """Time steps with and without CUDA graphs, interleaved; medians in milliseconds."""
    max_tokens = context + NUM_WARMUP_STEPS + steps + 64
    running = {
        name: RunningRequest(
            LLM(
                model,
                processor,
                engine=EngineConfig(kv_cache_tokens=2 * max_tokens, cuda_graphs=name == "recorded"),
            ),
            context,
            steps + 2 * NUM_WARMUP_STEPS + 8,
        )
        for name in ("recorded", "ordinary")
    }
    step_seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(steps):
        for name, request in running.items():
            step_seconds[name].append(request.step_seconds())
    return {
        name: {"step_ms": round(1000 * median(times), 3)} for name, times in step_seconds.items()
    }


def measure(
    shape: Qwen2VLConfig,
    device: torch.device,
    context: int,
    steps: int,
    num_bytes: int,
    *,
    compiled: bool = False,
) -> dict[str, Any]:
    """Measure decode with one shape, and the bandwidth before and after."""
    processor = load_processor("nano")
    before = bandwidth(device, num_bytes)
    model = random_model(with_nano_token_ids(processor, shape), device)
    weights = weight_bytes_per_token(model)
    if compiled and not compile_for_inference(model):
        raise SystemExit("nothing here can compile; see the warning")
    numbers = decode(model, processor, context, steps)
    after = bandwidth(device, num_bytes)
    best = {name: max(before[name], after[name]) for name in before}
    for result in numbers.values():
        rate = weights / result["step_ms"] / 1e6
        result["weights_gb_s"] = round(rate, 1)
        result["share"] = round(rate / max(best.values()), 3)
    return {"weights_gb": round(weights / 1e9, 3), **best, **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=list(PRESETS), default=["2B", "7B"])
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="copied to measure the bandwidth"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the regions between matrix products"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; benchmarks/engine.py measures a CPU")
    device, num_bytes = torch.device("cuda:0"), int(args.gigabytes * 1e9)
    print(
        format_result(
            {
                name: measure(
                    PRESETS[name],
                    device,
                    args.context,
                    args.steps,
                    num_bytes,
                    compiled=args.compile,
                )
                for name in args.shapes
            }
        )
    )


if __name__ == "__main__":
    main()
