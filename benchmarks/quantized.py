"""int8 and int4 quantization compared with bfloat16: loss of quality, speed, memory.

    GOMP_SPINCOUNT=1500 python benchmarks/quantized.py [--only quality | speed | memory]

quality: nano predicts the true answers of the mini suite's questions (teacher forcing); its
distributions over answer tokens are compared with those of unquantized float32: the
Kullback-Leibler divergence in nats, the share of tokens with the same argmax, and the share whose
argmax is right. speed: one block of the 2B's decoder for 1, 8 and 308 tokens, and one of its vision
tower for 1,024 patches, all precisions interleaved, each on several copies so that no CPU cache
holds them; `torch` is bfloat16 without kernels and prepacked weights, `forward` the model's forward
in place of the decode kernel. GOMP_SPINCOUNT lets threads wait as they do in commands. memory:
peaks of quantizing the folder of official_2b.py and of a first answer (peak_memory.py); only with
`--only memory`, as int4 takes minutes. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from official_2b import FOLDER
from peak_memory import measure
from record import format_result
from torch import Tensor

from qwen2vl.compile.regions import compile_for_inference
from qwen2vl.config import PRESETS
from qwen2vl.convert import quantize_folder
from qwen2vl.data.preprocess import TrainingExample
from qwen2vl.engine.decode.backend import DecodeToken
from qwen2vl.engine.decode.kernel_decode import KernelDecode
from qwen2vl.eval.mini import build_task
from qwen2vl.geometry import AttnMeta
from qwen2vl.linear.fused import fusion_groups
from qwen2vl.linear.kernel_linear import use_kernels
from qwen2vl.linear.prepacked import prepack_without_kernels
from qwen2vl.loading import load
from qwen2vl.model import KVCache, Qwen2VL, SequenceKVCaches
from qwen2vl.model.rope import vision_cos_sin
from qwen2vl.processor.processor import Processor
from qwen2vl.quantization.scheme import CpuQuantizationMode, layer_schemes, quantize_layers
from qwen2vl.synth import Mixture, render, sample
from qwen2vl.train.loader.batch import Batch, pack_batch

TASKS = "text shapes counting relations find name_box motion two_pictures".split()
QUESTIONS_PER_TASK = 50
BATCH_SIZE = 25  # conversations a forward

LAYERS = 8  # copies of each block: 1.1 GB in bfloat16
NUM_ROUNDS = {1: 15, 8: 9, 308: 7}  # tokens -> repetitions
SIDE = 32  # patches a side of the image


def batches(processor: Processor) -> Iterator[Batch]:
    """Build packed batches of the suite's questions with their answers."""
    examples = [
        TrainingExample(processor(render(case.spec).messages, for_training=True), task)
        for task in TASKS
        for case in build_task(task).cases[:QUESTIONS_PER_TASK]
    ]
    for start in range(0, len(examples), BATCH_SIZE):
        yield pack_batch(examples[start : start + BATCH_SIZE], pad_id=processor.config.bos_token_id)


@torch.inference_mode()
def answer_log_probs(model: Qwen2VL, questions: list[Batch]) -> Tensor:
    """Compute log-probabilities over the vocabulary at each token of each answer."""
    log_probs: list[Tensor] = []
    for batch in questions:
        hidden_TD = batch.forward(model)
        log_probs.append(model.logits(hidden_TD[batch.target_index_R]).float().log_softmax(-1))
    return torch.cat(log_probs)


def quality(num_examples: int) -> dict[str, Any]:
    unquantized, processor = load("nano", dtype="float32")
    questions = list(batches(processor))
    target_ids_R = torch.cat([batch.targets_R for batch in questions])
    want_RV = answer_log_probs(unquantized, questions)
    results: dict[str, Any] = {"tokens": len(target_ids_R)}

    def compare(name: str, model: Qwen2VL) -> None:
        got_RV = answer_log_probs(model, questions)
        divergence_R = (want_RV.exp() * (want_RV - got_RV)).sum(-1)
        argmax_R = got_RV.argmax(-1)
        results[name] = {
            "divergence": round(float(divergence_R.mean()), 5),
            "same": round(100 * float((argmax_R == want_RV.argmax(-1)).float().mean()), 1),
            "right": round(100 * float((argmax_R == target_ids_R).float().mean()), 1),
        }

    compare("float32", unquantized)
    compare("bfloat16", load("nano", dtype="bfloat16")[0])
    compare("int8", load("nano", dtype="bfloat16", quantize="int8")[0])
    compare("int4", load("nano", dtype="bfloat16", quantize="int4")[0])
    mixture = Mixture(max_questions=3)
    conversations = [render(sample(20240918, i, mixture)).messages for i in range(num_examples)]
    examples_input = [
        processor(messages, add_generation_prompt=False) for messages in conversations
    ]
    with tempfile.TemporaryDirectory() as folder:
        quantize_folder("nano", Path(folder) / "nano", "int4", examples=examples_input)
        compare("int4_calibrated", load(Path(folder) / "nano", dtype="bfloat16")[0])
    return results


def blocks(
    mode: CpuQuantizationMode | None, *, kernels: bool = True, compiled: bool = False
) -> Qwen2VL:
    """Build a 2B with few blocks, random weights and a tiny vocabulary."""
    preset = PRESETS["2B"]
    config = replace(
        preset,
        text=replace(preset.text, num_hidden_layers=LAYERS, vocab_size=64),
        vision=replace(preset.vision, depth=LAYERS),
        image_token_id=1,
        video_token_id=2,
    )
    with torch.device("meta"):
        model = Qwen2VL(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    for names, scheme in fusion_groups(layer_schemes(model, mode)) if mode else ():
        quantize_layers(model, names, scheme)
    if kernels:
        prepack_without_kernels(model)
        use_kernels(model)
    if compiled:
        compile_for_inference(model)
    return model.eval()


def prefill(model: Qwen2VL, tokens: int) -> Callable[[], object]:
    """Prepare the prefill of one prompt."""
    ids_T, positions_3T = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens).expand(3, -1)
    return lambda: model(ids_T, positions_3T, AttnMeta.build([tokens]))


def decode_caches(model: Qwen2VL, sequences: int) -> list[KVCache]:
    """Allocate the caches of sequences of 99 tokens."""
    caches = [
        KVCache.allocate(model.config.text, 128, torch.bfloat16, "cpu") for _ in range(sequences)
    ]
    for cache in caches:  # denormal numbers of unused memory would take time
        cache.k_LKZC.normal_()
        cache.v_LKZC.normal_()
        cache.length = 99
    return caches


def decode_forward(model: Qwen2VL, sequences: int) -> Callable[[], object]:
    """Prepare a decode step by the model's forward."""
    caches = decode_caches(model, sequences)
    ids_T, positions_3T = torch.zeros(sequences, dtype=torch.int64), torch.full((3, sequences), 99)
    meta = AttnMeta.build([1] * sequences, [100] * sequences)

    def decode() -> None:
        model(ids_T, positions_3T, meta, caches=SequenceKVCaches(caches, meta))
        for cache in caches:
            cache.length = 99

    return decode


def decode_kernel(model: Qwen2VL, sequences: int) -> Callable[[], object]:
    """Prepare a decode step by the decode kernel."""
    decode_backend = KernelDecode(model, sequences)
    if not decode_backend.max_batch_size:
        raise SystemExit("there are no kernels here; see the warning")
    tokens = [DecodeToken(0, 99, cache) for cache in decode_caches(model, sequences)]
    return lambda: decode_backend(tokens)


def vision_forward(model: Qwen2VL) -> Callable[[], object]:
    """Prepare a forward of the vision blocks for one image."""
    vision = model.config.vision
    positions_N2 = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    rotation = vision_cos_sin(positions_N2, vision.head_dim, vision.rope_theta)
    meta = AttnMeta.build([SIDE**2])
    start_NE = torch.randn(SIDE**2, vision.embed_dim, dtype=torch.bfloat16)

    def forward() -> None:
        hidden_NE = start_NE
        for block in model.visual.blocks:
            hidden_NE = block(hidden_NE, rotation, meta)

    return forward


def time_interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time functions interleaved; return the best time of each in milliseconds a block."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return {f"{name}_ms": round(1000 * seconds / LAYERS, 2) for name, seconds in best.items()}


@torch.inference_mode()
def speed() -> dict[str, Any]:
    modes: dict[str, CpuQuantizationMode | None] = {
        "bfloat16": None,
        "int8": "int8",
        "int4": "int4",
    }
    plain = blocks(None, kernels=False)
    eager = {name: blocks(mode) for name, mode in modes.items()}
    results: dict[str, Any] = {}
    for sequences in (1, 8):
        runs = {"torch": decode_forward(plain, sequences)}
        for name, model in eager.items():
            runs[name] = decode_kernel(model, sequences)
            runs[f"{name}_forward"] = decode_forward(model, sequences)
        results[f"block_of_{sequences}"] = time_interleaved(runs, NUM_ROUNDS[sequences])
    models = {"torch": plain} | eager
    for name in modes:
        models[f"{name}_compiled"] = blocks(modes[name], compiled=True)
    runs = {name: prefill(model, 308) for name, model in models.items()}
    results["block_of_308"] = time_interleaved(runs, NUM_ROUNDS[308])
    # The vision tower of int4 is that of int8.
    runs = {name: vision_forward(m) for name, m in models.items() if "int4" not in name}
    results["picture_of_1024"] = time_interleaved(runs, NUM_ROUNDS[308])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=["quality", "speed", "memory"])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of --only memory")
    args = parser.parse_args()
    numbers: dict[str, Any] = {}
    if args.only in (None, "quality"):
        numbers["quality"] = quality(args.examples)
    if args.only in (None, "speed"):
        numbers["speed"] = speed()
    if args.only == "memory":
        numbers["memory"] = measure(args.folder, args.examples)
    print(format_result(numbers))


if __name__ == "__main__":
    main()
