"""Small integers beside bfloat16: what they cost in answers, and save in time.

    python benchmarks/quantized.py [--only quality | speed] [--examples 64]

quality: nano reads the questions of the mini suite with their true answers; its odds for each token
of an answer are compared with those that it has unrounded in float32: the Kullback-Leibler
divergence in nats, the share of tokens whose likeliest word is the same, and the share that is
right. speed: one block of the 2B's decoder for 1, 8 and 308 tokens, and one of its tower for 1,024
patches, all precisions by turns, each on several copies so that no cache holds them; `plain` is
bfloat16 without packed weights. Prints one line for results.md.
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
from record import line
from torch import Tensor

from qwen2vl.compile.regions import compile_for_answers
from qwen2vl.config import PRESETS
from qwen2vl.convert import quantize_folder
from qwen2vl.data.preprocess import Example
from qwen2vl.engine.decode.compiled import SingleDecode
from qwen2vl.engine.decode.decoder import Token
from qwen2vl.eval.mini import build
from qwen2vl.geometry import AttnMeta
from qwen2vl.linear.fused import siblings
from qwen2vl.linear.gemv import multiply_single_rows
from qwen2vl.linear.prepacked import can_pack, pack_layers
from qwen2vl.loading import load
from qwen2vl.model import KVCache, Qwen2VL
from qwen2vl.model.rope import vision_rotation
from qwen2vl.processor.processor import Processor
from qwen2vl.quantization.scheme import Mode, quantize_layers, recipe
from qwen2vl.synth import Mixture, render, sample
from qwen2vl.train.loader.batch import Batch, pack

PARTS = "text shapes counting relations find name_box motion two_pictures".split()
QUESTIONS = 50  # of each part
AT_ONCE = 25  # conversations of one forward

LAYERS = 8  # copies of each block: 1.1 GB in bfloat16
ROUNDS = {1: 15, 8: 9, 308: 7}  # tokens -> how often
SIDE = 32  # patches a side of the picture


def batches(processor: Processor) -> Iterator[Batch]:
    """Lay out the questions of the suite with their answers."""
    examples = [
        Example(processor(render(case.spec).messages, for_training=True), part)
        for part in PARTS
        for case in build(part).cases[:QUESTIONS]
    ]
    for start in range(0, len(examples), AT_ONCE):
        yield pack(examples[start : start + AT_ONCE], pad_id=processor.config.bos_token_id)


@torch.inference_mode()
def log_odds(model: Qwen2VL, questions: list[Batch]) -> Tensor:
    """Compute the log-probabilities of all words, at each token of each answer."""
    rows: list[Tensor] = []
    for batch in questions:
        hidden_TD = batch.run(model)
        rows.append(model.logits(hidden_TD[batch.target_index_R]).float().log_softmax(-1))
    return torch.cat(rows)


def quality(num_examples: int) -> dict[str, Any]:
    whole, processor = load("nano", dtype="float32")
    questions = list(batches(processor))
    truth_R = torch.cat([batch.targets_R for batch in questions])
    want_RV = log_odds(whole, questions)
    found: dict[str, Any] = {"tokens": len(truth_R)}

    def compare(name: str, model: Qwen2VL) -> None:
        got_RV = log_odds(model, questions)
        divergence_R = (want_RV.exp() * (want_RV - got_RV)).sum(-1)
        words_R = got_RV.argmax(-1)
        found[name] = {
            "divergence": round(float(divergence_R.mean()), 5),
            "same": round(100 * float((words_R == want_RV.argmax(-1)).float().mean()), 1),
            "right": round(100 * float((words_R == truth_R).float().mean()), 1),
        }

    compare("float32", whole)
    compare("bfloat16", load("nano", dtype="bfloat16")[0])
    compare("int8", load("nano", dtype="bfloat16", quantize="int8")[0])
    compare("int4", load("nano", dtype="bfloat16", quantize="int4")[0])
    mixture = Mixture(questions=3)
    drawn = [render(sample(20240918, i, mixture)).messages for i in range(num_examples)]
    shown = [processor(messages, add_generation_prompt=False) for messages in drawn]
    with tempfile.TemporaryDirectory() as folder:
        quantize_folder("nano", Path(folder) / "nano", "int4", examples=shown)
        compare("int4_calibrated", load(Path(folder) / "nano", dtype="bfloat16")[0])
    return found


def blocks(mode: Mode | None, *, packed: bool = True, compiled: bool = False) -> Qwen2VL:
    """Build some blocks of the 2B's towers with random weights, and nearly no words."""
    full = PRESETS["2B"]
    config = replace(
        full,
        text=replace(full.text, num_hidden_layers=LAYERS, vocab_size=64),
        vision=replace(full.vision, depth=LAYERS),
        image_token_id=1,
        video_token_id=2,
    )
    with torch.device("meta"):
        model = Qwen2VL(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    for names, kind in siblings(recipe(model, mode)) if mode else ():
        quantize_layers(model, names, kind)
    if packed and can_pack():
        pack_layers(model)
    multiply_single_rows(model)
    if compiled:
        compile_for_answers(model)
    return model.eval()


def step(model: Qwen2VL, tokens: int) -> Callable[[], object]:
    """Prepare a step: up to 8 sequences of 100 tokens get another, or one prompt is read."""
    ids_T = torch.zeros(tokens, dtype=torch.int64)
    if tokens > 8:
        positions_3T = torch.arange(tokens).expand(3, -1)
        return lambda: model(ids_T, positions_3T, AttnMeta.build([tokens]))
    text, past = model.config.text, 99
    caches = [KVCache.allocate(text, 128, torch.bfloat16, "cpu") for _ in range(tokens)]
    meta = AttnMeta.build([1] * tokens, [past + 1] * tokens)

    def decode() -> None:
        for cache in caches:
            cache.length = past
        model(ids_T, torch.full((3, tokens), past), meta, caches=caches)

    return decode


def quick_step(model: Qwen2VL) -> Callable[[], object]:
    """Prepare a step of one sequence of 100 tokens through blocks that are compiled whole."""
    quick = SingleDecode.compiled(model)
    if quick is None:
        raise SystemExit("nothing here can compile; see the warning")
    cache = KVCache.allocate(model.config.text, 128, torch.bfloat16, "cpu")
    cache.length = 99
    token = Token(0, 99, cache)
    return lambda: quick([token])


def picture(model: Qwen2VL) -> Callable[[], object]:
    """Prepare the blocks of the tower for one picture."""
    vision = model.config.vision
    places_N2 = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    rotation = vision_rotation(places_N2, vision.head_dim, vision.rope_theta)
    frames = AttnMeta.build([SIDE**2])
    start_NE = torch.randn(SIDE**2, vision.embed_dim, dtype=torch.bfloat16)

    def look() -> None:
        hidden_NE = start_NE
        for block in model.visual.blocks:
            hidden_NE = block(hidden_NE, rotation, frames)

    return look


def by_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Give the best time of each, in milliseconds a block."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return {f"{name}_ms": round(1000 * seconds / LAYERS, 2) for name, seconds in best.items()}


@torch.inference_mode()
def speed() -> dict[str, Any]:
    models = {
        "plain": blocks(None, packed=False),
        "bfloat16": blocks(None),
        "bfloat16_compiled": blocks(None, compiled=True),
        "int8": blocks("int8"),
        "int8_compiled": blocks("int8", compiled=True),
    }
    found: dict[str, Any] = {}
    found["picture_of_1024"] = by_turns({n: picture(m) for n, m in models.items()}, rounds=7)
    models["int4"] = blocks("int4")
    models["int4_compiled"] = blocks("int4", compiled=True)
    for tokens, rounds in ROUNDS.items():
        runs = {
            name: quick_step(model) if tokens == 1 and "compiled" in name else step(model, tokens)
            for name, model in models.items()
        }
        found[f"block_of_{tokens}"] = by_turns(runs, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=["quality", "speed"])
    parser.add_argument("--examples", type=int, default=64)
    given = parser.parse_args()
    numbers: dict[str, Any] = {}
    if given.only != "speed":
        numbers["quality"] = quality(given.examples)
    if given.only != "quality":
        numbers["speed"] = speed()
    print(line(numbers))


if __name__ == "__main__":
    main()
